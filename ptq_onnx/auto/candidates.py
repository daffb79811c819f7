"""What can be decided: each module, at 8 bits where it has fewer, or in float; at 16 bits instead
where the runtime has no float part.

A module is the ops of one role in one block, as ``--keep-float`` and ``--more-bits`` name it.
What a decision changes is what the quantizer makes of these options: where one input of a product
stays float, its other input may as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ptq_onnx.analysis.modules import find_modules
from ptq_onnx.auto.costs import cost_of
from ptq_onnx.config.bits import BYTE, WIDEST
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.selector import MoreBits, Selector
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.quantizers.base import SiteQuantizer

Kind = Literal["8 bits", "16 bits", "float"]
WIDTHS: dict[Kind, int] = {"8 bits": BYTE, "16 bits": WIDEST}
"""Bits of the decisions that are no float."""


@dataclass(frozen=True)
class Candidate:
    """One decision on one module: the tensors whose rule it changes, and what that costs.

    ``operations``: what the runtime computes with more bits (see ``costs.py``).
    """

    module: str
    role: str
    block: int | None
    kind: Kind
    tensors: frozenset[str]
    operations: float

    @property
    def selector(self) -> Selector:
        """How the options name the module."""
        return Selector(self.role, None if self.block is None else (self.block,))


def with_decisions(config: QuantizeConfig, chosen: Iterable[Candidate]) -> QuantizeConfig:
    """The config that quantizes so without any search."""
    chosen = list(chosen)
    floats = merged(c.selector for c in chosen if c.kind == "float")
    wider = [
        str(MoreBits(Selector.parse(text), bits))
        for kind, bits in WIDTHS.items()
        for text in merged(c.selector for c in chosen if c.kind == kind)
    ]
    return replace(
        config,
        mixed=False if config.runtime.all_codes else config.mixed,
        auto=False,
        max_drop=None,
        min_sqnr=None,
        keep_float=(*config.keep_float, *floats),
        more_bits=(*config.more_bits, *wider),
    )


def merged(selectors: Iterable[Selector]) -> tuple[str, ...]:
    """Selectors as text, those of one role in several blocks as one: ``fc2@5,6``."""
    blocks: dict[str, set[int] | None] = {}
    for selector in selectors:
        known = blocks.setdefault(selector.role, set())
        if selector.blocks is None or known is None:
            blocks[selector.role] = None
        else:
            known.update(selector.blocks)
    return tuple(
        str(Selector(role, None if found is None else tuple(sorted(found))))
        for role, found in blocks.items()
    )


def kinds_of(config: QuantizeConfig) -> tuple[Kind, ...]:
    """What a module can get on the config's target."""
    return ("8 bits", "16 bits") if config.runtime.all_codes else ("8 bits", "float")


def find_candidates(quantizer: SiteQuantizer, specs: Mapping[str, TensorSpec]) -> list[Candidate]:
    """Every decision that changes something, in the order of the graph.

    Of several with the same effect the one whose own tensors are the most of it.
    """
    plan, before = quantizer.plan, quantizer.rules
    ops = [
        m
        for m in find_modules(plan.model, plan.blocks, plan.sites, specs)
        if m.scope == "op" and m.part == "all"
    ]
    found: dict[frozenset[tuple[str, Rule | None]], tuple[int, Candidate]] = {}
    for module in ops:
        for kind in kinds_of(plan.config):
            one = Candidate(module.name, module.role or "", module.block, kind, frozenset(), 0.0)
            after = quantizer.rules_under(with_decisions(plan.config, [one]))
            changed = {t: after.get(t) for t, rule in before.items() if after.get(t) != rule}
            if not changed:
                continue
            one = replace(
                one,
                tensors=frozenset(changed),
                operations=cost_of(plan.config)(plan.model, plan.sites, before, after),
            )
            own = len(module.tensors & one.tensors)
            key = frozenset(changed.items())
            if key not in found or own > found[key][0]:
                found[key] = own, one
    return [candidate for _, candidate in found.values()]
