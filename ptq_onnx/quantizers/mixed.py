"""Which activations get 16 bits where 8 serve most: those that 8-bit codes hold worst.

The expected noise of a tensor's 8-bit codes is s² / 12; over the mean of its squares it says how
much of the tensor is lost. A stream with a massive channel, the hidden layer that makes it: they
stand at the top of that list by a wide margin. The factors of attention's products stay at 8 bits:
their noise averages out over tokens and channels.

An op computes in the widest of the types on its sides, and what it makes is converted behind it:
with a tensor in 16 bits, all that is made of it has 16 bits first. The budget counts that too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from ptq_onnx.calibration.methods import Statistics
from ptq_onnx.config.bits import BYTE, WIDEST
from ptq_onnx.numerics.spec import Rule, Site, TensorSpec

BUDGET = 1 / 3
"""Of the elements of all activations of one image, as ops make them."""
FACTORS = frozenset(("q", "k", "v", "qk", "softmax", "av"))
SECOND = ("k", "v")
"""The second factors of QKᵀ and A·V."""
NARROW = "--more-bits: k and v keep 8 bits, the NPU counts no more of a product's second factor."
ENOUGH = 40.0
"""dB of the codes from which on 16 bits are not worth it."""


def widened(
    rules: Mapping[str, Rule],
    specs: Mapping[str, TensorSpec],
    sites: Mapping[str, Site],
    stats: Statistics,
) -> tuple[dict[str, Rule], str]:
    """Rules of 16 bits for what 8 hold worst, and a sentence that says how much that is."""
    acts = {s.tensor: s for s in sites.values() if s.tensor in specs and not s.is_parameter}
    total = sum(s.elements for s in acts.values())
    made = _made_with(acts)
    losses = {
        t: _loss(specs[t], stats)
        for t, s in acts.items()
        if s.role not in FACTORS and rules[t].bits <= BYTE and t in stats.channels
    }
    wide = set[str]().union(*(made[t] for t in acts if rules[t].bits > BYTE))
    spent = sum(acts[t].elements for t in wide)
    chosen: dict[str, Rule] = {}
    for tensor in sorted(losses, key=lambda t: -losses[t]):
        size = sum(acts[t].elements for t in made[tensor] - wide)
        if losses[tensor] < 10 ** (-ENOUGH / 10) or spent + size > BUDGET * total:
            continue
        spent += size
        wide |= made[tensor]
        chosen[tensor] = replace(rules[tensor], bits=WIDEST)
    worst = sorted({sites[t].role for t in chosen})
    note = (
        f"Mixed: {len(chosen)} of {len(acts)} activations have {WIDEST} bits, those that {BYTE}"
        f" hold worst, of the roles {', '.join(worst) or 'none'}; with what ops make of them,"
        f" {100 * spent / max(total, 1):.0f} % of all elements; --no-mixed leaves {BYTE}"
        " everywhere."
    )
    return chosen, note


def narrowed(rules: Mapping[str, Rule], sites: Mapping[str, Site]) -> dict[str, Rule]:
    """Rules of second factors for which more bits were asked than the NPU counts."""
    return {
        t: replace(rule, bits=BYTE)
        for t, rule in rules.items()
        if sites[t].role in SECOND and not sites[t].is_parameter and rule.bits > BYTE
    }


def _made_with(acts: Mapping[str, Site]) -> dict[str, frozenset[str]]:
    """Of each tensor, those that ops make in 16 bits where it has them: itself, and what is made
    of it."""
    of = defaultdict[str | None, list[str]](list)
    for tensor, site in acts.items():
        of[site.producer].append(tensor)
    return {
        t: frozenset([t, *(made for name in s.consumers for made in of[name])])
        for t, s in acts.items()
    }


def _loss(spec: TensorSpec, stats: Statistics) -> float:
    """Noise of the codes over the signal."""
    found = stats.channels[spec.tensor]
    signal = float(found.power.sum()) / max(found.count * found.power.size, 1)
    return float(spec.scale) ** 2 / 12 / max(signal, 1e-30)
