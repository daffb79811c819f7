"""Hidden channels far above the rest, held in pieces: one scale then serves all of an MLP's.

Behind an activation function that leaves large values as they are (f(x) = x), a channel of range
[0, kM] is the sum of k channels that end at M:

    f(x) = Σ min(f(x - iM), M),  i = 0 … k - 1

Each piece is a column of fc1 with iM less bias, and reads its own copy of fc2's row. The bound
costs nothing where the output has codes that end at M: they clip by themselves. Between two pieces,
for iM - 3 < x < iM, f is not yet linear; the sum is then off by at most 0.17 for GELU, in a channel
whose step would have been larger before.

ViT-Ti (AugReg) has one such channel, in block 7: it reaches 207, all others 8. Held in one scale of
8 bits everything else of that layer is lost; 21 more columns of 768 cure it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.calibration.methods import collect
from ptq_onnx.calibration.robust import robust_range
from ptq_onnx.calibration.row_samples import collect_rows
from ptq_onnx.equalization.foldings import Hidden, hidden_channels, readers_behind
from ptq_onnx.equalization.linear_weights import power_of_rows
from ptq_onnx.graph.bounded import set_bound
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.codes.code import TINY, Code, Numbers
from ptq_onnx.numerics.codes.logarithmic import Logarithmic
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.range_search import few_rows, logarithmic_range_of_rows
from ptq_onnx.numerics.spec import PER_TENSOR, Rule, Site
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.code_regions import DEAD

Array = NDArray[np.float32]
Double = NDArray[np.float64]
Progress = Callable[[int], None]

LINEAR_FROM = {"Gelu": 6.0, "QuickGelu": 9.0, "Silu": 16.0, "Relu": 1e-3}
"""From here on f(x) = x, but for 1e-5."""
LOGARITHMIC = Logarithmic()
CODES: tuple[Code, ...] = (Uniform(), LOGARITHMIC)
"""Those whose largest is the bound, whatever their other numbers."""
MOST_ADDED = 1 / 8
"""Channels that may be added, of those there are."""
WORTH = 6.0
"""dB of expected noise that pieces must save: a clip range that is searched saves some as well. Of
logarithmic codes, which reach far by themselves, the noise on a sample counts."""
BOUNDS = 40
"""Values of M tried between where f is linear and the largest value."""


@dataclass(frozen=True)
class Pieces:
    """One activation whose output's largest channels are held in pieces."""

    tensor: str
    block: int | None
    largest: float
    """The largest value before."""
    low: float
    """Where the codes begin."""
    bound: float
    """M, the largest value now."""
    channels: int
    """How many are held in pieces …"""
    added: int
    """… and how many channels that adds …"""
    width: int
    """… to so many."""
    gain_db: float
    """By how much the noise expected of one scale falls."""
    counts: tuple[int, ...] = field(repr=False)
    """Pieces by channel."""


@dataclass(frozen=True)
class Held:
    """An activation whose output one scale is to hold, and what that is on the images."""

    site: Site
    low: float
    highs: Double
    """[C]"""
    power: Double
    """Σ W² of what reads each channel, [C]."""
    linear_from: float
    bits: int
    rows: Array | None = None
    """A sample [R, C], where the codes are logarithmic."""


def held_in_one(
    plan: Plan,
    rules: Mapping[str, Rule],
    batches: Iterable[Any],
    progress: Progress | None = None,
) -> list[Held]:
    """The activations that ``rules`` hold in one scale, from one run of batches [B, C, H, W], and
    another for those of logarithmic codes that pieces may help; none are run where there are none.
    """
    wanted = dict(_candidates(plan, rules))
    if not wanted:
        return []
    sites, threads = [plan.sites[name] for name in wanted], plan.config.threads
    stats = collect(plan.model, sites, batches, threads=threads, progress=progress)
    found = []
    for site, (name, hidden) in zip(sites, wanted.items(), strict=True):
        low, high = robust_range(stats.channels[name])
        highs = np.maximum(high.astype(np.float64), 0)
        power = power_of_rows(hidden.after, len(highs))
        first, bits = LINEAR_FROM[hidden.activation.op_type], rules[name].bits
        found.append(Held(site, float(low.min()), highs, power, first, bits))
    logarithmic = {name for name in wanted if rules[name].code == LOGARITHMIC}
    found = [h for h in found if h.site.tensor not in logarithmic or _pieces(h, 1.0) is not None]
    sampled = [h.site for h in found if h.site.tensor in logarithmic]
    rows = _samples(plan, sampled, batches)
    return [replace(h, rows=rows.get(h.site.tensor)) for h in found]


def _samples(plan: Plan, sites: list[Site], batches: Iterable[Any]) -> dict[str, Array]:
    """A few rows [R, C] of each."""
    threads, rows = plan.config.threads, dict[str, Array]()
    for group in collect_rows(plan.model, sites, batches, threads=threads) if sites else ():
        rows |= {name: few_rows(found) for name, found in group.items()}
    return rows


def split_hidden(
    plan: Plan, held: Iterable[Held], least: float = 1.0
) -> tuple[Plan, tuple[Pieces, ...]]:
    """A plan for a copy of the model with its massive hidden channels in pieces, and which.

    Bounds are at least ``least`` times where the function is linear. The plan itself where none
    gains.
    """
    found = tuple(one for one in (_worth_it(of, least) for of in held) if one is not None)
    return (in_pieces(plan, found) if found else plan), found


def fit(plan: Plan, rules: Mapping[str, Rule], found: Iterable[Pieces]) -> bool:
    """Whether pieces that an earlier run chose are of this model's activations."""
    wanted = {name: plan.sites[name] for name, _ in _candidates(plan, rules)}
    return all(
        one.tensor in wanted
        and wanted[one.tensor].shape[wanted[one.tensor].channel_axes[0]] == len(one.counts)
        and min(one.counts) >= 1
        and sum(one.counts) <= (1 + MOST_ADDED) * len(one.counts)
        and -np.inf < one.low <= 0 < one.bound < np.inf
        for one in found
    )


def _candidates(plan: Plan, rules: Mapping[str, Rule]) -> Iterable[tuple[str, Hidden]]:
    """Outputs of activations that linears alone read and that one scale is to hold."""
    values = {str(v.name): v for node in plan.model.graph for v in node.outputs}
    for name, site in plan.sites.items():
        rule, value = rules.get(name), values.get(name)
        if rule is None or value is None or site.is_parameter or len(site.channel_axes) != 1:
            continue
        if rule.grain != PER_TENSOR or rule.code not in CODES or rule.around:
            continue
        linears = readers_behind(value)
        hidden = None if linears is None else hidden_channels(value, linears)
        if hidden is None or hidden.activation.op_type not in LINEAR_FROM:
            continue
        if all(constant(n.inputs[1]) is not None for n in (hidden.before, *hidden.after)):
            yield name, hidden


def _worth_it(held: Held, least: float) -> Pieces | None:
    """The pieces, where they also lower the noise of the sample's codes by ``WORTH``."""
    found = _pieces(held, least)
    if found is None or held.rows is None:
        return found
    gain = _logarithmic_gain(held, held.rows, np.array(found.counts), found.bound)
    return replace(found, gain_db=gain) if gain >= WORTH else None


def _pieces(held: Held, least: float) -> Pieces | None:
    """The bound with the least expected noise: (M - low)² Σ k_c p_c, p_c being the power of what
    reads channel c. None where it gains less than ``WORTH``."""
    highs, first = held.highs, least * held.linear_from
    top = float(highs.max())
    if top <= 1.5 * first:
        return None
    bounds = np.geomspace(first, top, BOUNDS)
    counts = np.maximum(np.ceil(highs / bounds[:, None]), 1)  # [bounds, C]
    noise = (bounds - held.low) ** 2 * (counts @ held.power)
    allowed = (counts - 1).sum(axis=1) <= MOST_ADDED * len(highs)
    best = int(np.argmin(np.where(allowed, noise, np.inf)))
    gain = 10 * float(np.log10(noise[-1] / noise[best]))
    if gain < WORTH:
        return None
    chosen = counts[best].astype(np.int64)
    low, bound = on_grid(held.low, float(np.float32(bounds[best])), 1 << held.bits)
    return Pieces(
        tensor=held.site.tensor,
        block=held.site.block,
        largest=top,
        low=low,
        bound=bound,
        channels=int((chosen > 1).sum()),
        added=int((chosen - 1).sum()),
        width=len(chosen),
        gain_db=gain,
        counts=tuple(int(n) for n in chosen),
    )


def _logarithmic_gain(held: Held, rows: Array, counts: NDArray[np.int64], bound: float) -> float:
    """By how many dB pieces lower the noise of the best logarithmic codes for rows [R, C]."""
    first = np.cumsum(counts) - counts
    place = np.arange(int(counts.sum())) - np.repeat(first, counts)
    wide = np.repeat(rows, counts, axis=1) - np.float32(bound) * place.astype(np.float32)
    pieces = np.minimum(np.where(place > 0, np.maximum(wide, 0), wide), np.float32(bound))
    made = _decoded(pieces, np.repeat(held.power, counts), held.bits, bound)
    whole = _decoded(rows, held.power, held.bits)
    noise = np.add.reduceat(made - pieces, first, axis=1), whole - rows
    after, before = (float(np.sum(one.astype(np.float64) ** 2 @ held.power)) for one in noise)
    return 10 * float(np.log10(max(before, TINY) / max(after, TINY)))


def _decoded(rows: Array, power: Double, bits: int, highest: float | None = None) -> Array:
    """What the best logarithmic codes make of rows [R, C]."""
    found = logarithmic_range_of_rows(rows, power, bits, highest)
    numbers = Numbers(bits, False, found.scale, found.zero_point, found.details)
    return LOGARITHMIC.values(LOGARITHMIC.codes(rows, numbers), numbers)


def in_pieces(plan: Plan, found: Iterable[Pieces]) -> Plan:
    """The plan for a copy of its model with these in pieces, and the ranges that go with it."""
    model = plan.model.clone()
    graph = model.graph
    values = {str(v.name): v for node in graph for v in node.outputs}
    fixed = dict(plan.fixed)
    for one in found:
        value = values[one.tensor]
        linears = readers_behind(value)
        hidden = None if linears is None else hidden_channels(value, linears)
        assert hidden is not None
        hidden.divide(graph, np.array(one.counts, np.int64), one.bound)
        set_bound(hidden.activation, one.bound)
        fixed[one.tensor] = one.low, one.bound
        fixed[str(hidden.before.outputs[0].name)] = DEAD[hidden.activation.op_type], one.bound
    sites = find_sites(model, plan.blocks, whole=plan.config.runtime.all_codes)
    return replace(plan, model=model, sites=sites, fixed=fixed)


def on_grid(low: float, bound: float, levels: int) -> tuple[float, float]:
    """The range down to ``low`` at least, whose largest code is the bound and which has zero."""
    zero = min(int(np.ceil(max(-low, 0) / (bound - min(low, 0)) * (levels - 1))), levels - 2)
    return -zero * bound / (levels - 1 - zero), bound


def describe(one: Pieces) -> str:
    """A note for the user."""
    return (
        f"Pieces: {one.channels} of {one.width} channels of '{one.tensor}' reach {one.largest:.3g},"
        f" far above the rest; they are held in pieces up to {one.bound:.3g}, by {one.added} more"
        f" channels: {one.gain_db:.1f} dB less noise is expected of one scale."
    )
