"""``lowbit --mixed``: bits for the weights and the activations of each role in each block.

What is mixed is what ``--bits`` gives its width: not the ends that have 8 bits, nor what
``--more-bits`` names. The noise of every group in that width is found (``module_noise.py``); in
another it is expected to fall as that of a normal variable does, and the bits are those of the
least sum within the target (``numerics/allocation.py``), weights and activations each by
themselves. The choice is written as ``--more-bits`` writes it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.analysis.decibels import decibels
from ptq_onnx.analysis.mixed_results import Mixed, MixedModule, MixedPoint
from ptq_onnx.analysis.variants import Images
from ptq_onnx.auto.candidates import merged
from ptq_onnx.auto.module_noise import Group, module_noise
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.selector import MoreBits, Selector
from ptq_onnx.errors import ConfigError
from ptq_onnx.numerics.allocation import ERRORS, allocate, expected
from ptq_onnx.numerics.multiples import WIDEST, beside_codes
from ptq_onnx.numerics.spec import Rule, Site, TensorSpec
from ptq_onnx.quantizers.base import SiteQuantizer

WIDTHS = tuple(ERRORS)
STORED = np.array([4 if width <= WIDEST else 8 for width in WIDTHS])
"""Bits of a weight's code in the file."""
PROBES = ("2/2/2", "3/3/3")
"""Widths under which what is mixed has other bits."""
POINTS = (2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8)
"""Mean bits that the report tells of."""
Choice = NDArray[np.int64]


def mix(
    quantizer: SiteQuantizer,
    specs: Mapping[str, TensorSpec],
    images: Images,
    megabytes: Callable[[], float],
    progress: Callable[[int], Callable[[int], None]],
) -> tuple[QuantizeConfig, Mixed]:
    """The config with the bits that were chosen, and why. ``specs``: in the width of ``--bits``;
    ``megabytes``: of the file in that width. Raises ConfigError where the target is out of reach.
    """
    started = time.perf_counter()
    config, groups = quantizer.plan.config, groups_of(quantizer)
    if not groups:
        raise ConfigError("--mixed: there is nothing whose width --bits decides.")
    noise = module_noise(
        config.mixed_by,
        quantizer.plan.model,
        specs,
        groups,
        images,
        threads=config.threads,
        workers=config.workers,
        progress=progress(len(groups)),
    )
    parts = [_Part([g for g in groups if g.weights is w], noise, groups) for w in (True, False)]
    weights, activations = parts
    size = megabytes()
    if config.target_size is not None:
        chosen = [weights.within_bytes(config.target_size, size), activations.same()]
    else:
        chosen = [part.within(config.target_bits or part.mean(part.same())) for part in parts]
    bits = {g: WIDTHS[c] for part, own in zip(parts, chosen, strict=True)
            for g, c in zip(part.groups, own, strict=True)}  # fmt: skip
    more = decisions(quantizer, bits)
    new = replace(
        config,
        mixed=None,
        target_bits=None,
        target_size=None,
        mixed_by="output",
        more_bits=(*config.more_bits, *more),
    )
    _check(quantizer, new, bits)
    mixed = Mixed(
        by=config.mixed_by,
        target_bits=config.target_bits,
        target_size=config.target_size,
        weights=(weights.mean(weights.same()), weights.mean(chosen[0])),
        activations=(activations.mean(activations.same()), activations.mean(chosen[1])),
        megabytes=size + weights.growth(chosen[0]),
        images=images.real,
        modules=tuple(
            MixedModule(g.name, g.part, g.role, g.block, g.elements, bits[g], float(n))
            for g, n in zip(groups, noise, strict=True)
        ),
        points=tuple(_point(target, weights, activations, size) for target in POINTS),
        more_bits=more,
        seconds=time.perf_counter() - started,
    )
    return new, mixed


class _Part:
    """Weights, or activations: groups, their elements, and the noise of each in each width."""

    def __init__(
        self, groups: Sequence[Group], noise: NDArray[np.float64], of: Sequence[Group]
    ) -> None:
        self.groups = groups
        own = dict(zip(of, noise, strict=True))
        self.noise = expected(np.array([own[g] for g in groups]), [g.bits for g in groups], WIDTHS)
        self.elements = np.array([g.elements for g in groups], np.int64)
        beside = np.array([8 * g.beside for g in groups], np.int64)
        blocks = np.array(WIDTHS) <= WIDEST
        self.stored = self.elements[:, None] * STORED + beside[:, None] * blocks
        """Bits in the file, [G, W]."""

    def same(self) -> Choice:
        """As it is."""
        return np.array([WIDTHS.index(g.bits) for g in self.groups], np.int64)

    def mean(self, choice: Choice) -> float:
        """Bits by elements."""
        return float(np.average(np.array(WIDTHS)[choice], weights=self.elements))

    def lost(self, choice: Choice) -> float:
        """The noise that is expected."""
        return float(self.noise[np.arange(len(choice)), choice].sum())

    def within(self, bits: float) -> Choice:
        """The least noise with so many bits in the mean."""
        costs = self.elements[:, None] * np.array(WIDTHS)
        return allocate(self.noise, costs, int(bits * self.elements.sum() * (1 + 1e-9)))

    def growth(self, choice: Choice) -> float:
        """Million bytes that the file gets."""
        return (self.held(choice) - self.held(self.same())) / 8e6

    def held(self, choice: Choice) -> int:
        """Bits in the file."""
        return int(self.stored[np.arange(len(choice)), choice].sum())

    def within_bytes(self, megabytes: float, size: float) -> Choice:
        """The least noise of weights in a file of so many million bytes, which has ``size`` as it
        is. Raises ConfigError."""
        costs, now = self.stored, self.held(self.same())
        budget = now + int((megabytes - size) * 8e6)
        least = size + (int(costs.min(axis=1).sum()) - now) / 8e6
        if least > megabytes:
            raise ConfigError(
                f"--target-size {megabytes:g}: with weights of 4 bits the file has {least:.2f} MB;"
                " ask for more, or give patch embedding and head fewer bits by --no-wide-ends."
            )
        return allocate(self.noise, costs, budget)


def groups_of(quantizer: SiteQuantizer) -> list[Group]:
    """What is mixed, in the order of the graph."""
    plan = quantizer.plan
    one, other = (quantizer.rules_under(replace(plan.config, bits=bits)) for bits in PROBES)
    found: dict[tuple[str, int | None], list[str]] = {}
    for tensor in _changed(one, other):
        site = plan.sites[tensor]
        found.setdefault((site.role, site.block), []).append(tensor)
    groups = []
    for (role, block), tensors in found.items():
        first = plan.sites[tensors[0]]
        elements = sum(_elements(plan.sites[tensor]) for tensor in tensors)
        bits = quantizer.rules[tensors[0]].bits
        shapes = [plan.sites[t].shape for t in tensors if first.is_parameter]
        beside = sum(beside_codes(shape) for shape in shapes if len(shape) == 2)
        names = frozenset(tensors)
        groups.append(Group(role, block, first.is_parameter, bits, names, elements, beside))
    return groups


def _elements(site: Site) -> int:
    """Parameters, or elements of one image."""
    return math.prod(map(int, site.shape)) if site.is_parameter else site.elements


def _changed(one: Mapping[str, Rule], other: Mapping[str, Rule]) -> list[str]:
    """Tensors whose width differs."""
    return [tensor for tensor, rule in one.items() if rule.bits != other[tensor].bits]


def decisions(quantizer: SiteQuantizer, bits: Mapping[Group, int]) -> tuple[str, ...]:
    """The bits as ``--more-bits`` takes them. Of two that name a tensor the later counts, so that
    roles which name most besides their own come first."""
    config = quantizer.plan.config
    named: dict[str, int] = {}
    for role in dict.fromkeys(group.role for group in bits):
        probes = [replace(config, more_bits=(f"{role}={b}",)) for b in (2, 3)]
        named[role] = len(_changed(*map(quantizer.rules_under, probes)))
    order = sorted(named, key=lambda role: -named[role])
    found: list[str] = []
    for role in order:
        own = {g: b for g, b in bits.items() if g.role == role}
        for width in sorted(set(own.values())):
            some = merged(_selectors(g for g, b in own.items() if b == width))
            found += [f"{MoreBits(Selector.parse(text)).selector}={width}" for text in some]
    return tuple(found)


def _selectors(groups: Iterable[Group]) -> list[Selector]:
    return [Selector(g.role, None if g.block is None else (g.block,)) for g in groups]


def _check(quantizer: SiteQuantizer, config: QuantizeConfig, bits: Mapping[Group, int]) -> None:
    """The options say what was chosen. Raises ConfigError, for a model whose roles overlap."""
    rules = quantizer.rules_under(config)
    for group, width in bits.items():
        wrong = [t for t in group.tensors if rules[t].bits != width]
        if wrong:
            raise ConfigError(
                f"--mixed: {group.name} cannot be given {width} bits by --more-bits without others;"
                " name the widths of this model with --more-bits."
            )


def _point(target: float, weights: _Part, activations: _Part, size: float) -> MixedPoint:
    chosen = weights.within(target), activations.within(target)
    uniform: list[float | None] = [None, None]
    if target in WIDTHS:
        alike = [np.full(len(p.groups), WIDTHS.index(int(target))) for p in (weights, activations)]
        uniform = [decibels(p.lost(c)) for p, c in zip((weights, activations), alike, strict=True)]
    return MixedPoint(
        bits=target,
        megabytes=size + weights.growth(chosen[0]),
        weights_db=decibels(weights.lost(chosen[0])),
        activations_db=decibels(activations.lost(chosen[1])),
        uniform_weights_db=uniform[0],
        uniform_activations_db=uniform[1],
    )
