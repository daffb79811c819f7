"""A range of its own for every channel of what linears read, found on a sample of rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.roles import Role
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.config.bits import BYTE
from ptq_onnx.equalization.convolution_steps import WORTH_A_MUL
from ptq_onnx.equalization.factor_search import Product, choose_factor, normalized
from ptq_onnx.equalization.foldings import (
    hidden_channels,
    insert_affine,
    new_nodes_as,
    norm_before,
    readers_of,
)
from ptq_onnx.equalization.form import Form
from ptq_onnx.equalization.hidden_factors import choose_hidden_factor, with_copies
from ptq_onnx.equalization.linear_weights import move_rows, power_of_rows
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.codes.code import TINY, Solved
from ptq_onnx.numerics.multiples import ROWS, WIDEST
from ptq_onnx.numerics.range_search import channel_bounds, logarithmic_range_of_rows
from ptq_onnx.numerics.spec import Rule, Site
from ptq_onnx.quantizers.base import Move

Array = NDArray[np.float32]
Double = NDArray[np.float64]

INTO = {"q": "k", "k": "q", "v": "proj", "av": "Mul, Add"}
"""Where the factors of a role go, in reports."""


@dataclass
class Steps:
    """The state of one model, changed in place."""

    form: Form
    rules: dict[str, Rule]
    moves: list[Move] = field(default_factory=list)
    roles: dict[str, Role] = field(default_factory=dict)
    solved: dict[str, Solved] = field(default_factory=dict)
    ranges: dict[str, tuple[Double, Double]] = field(default_factory=dict)
    """What channels reach in all images, where that is known beside a sample."""

    def __post_init__(self) -> None:
        self.graph = self.form.model.graph
        self.values = {str(v.name): v for n in self.graph for v in n.outputs}
        self.samples: dict[str, Array] = {}
        self.places = {(s.role, s.block): s for s in self.form.sites.values() if not s.is_parameter}

    def levels(self, site: Site) -> int:
        """How many codes its rule has."""
        return 1 << self.rules[site.tensor].bits

    def steps(
        self, site: Site, products: list[Product] | None = None
    ) -> tuple[Double, Double, Solved]:
        """Shift and factor per channel [C], and the one scale and zero point then.

        The factor follows the steps as far as the ``products`` that read the tensor allow, the
        rows of whose weights it multiplies; without any it is the steps.
        """
        levels = self.levels(site)
        rows = self.samples[site.tensor]
        low, high = channel_bounds(rows, levels)
        half = np.maximum((high - low) / 2, TINY)
        half = np.maximum(half, 1e-6 * half.max())  # a channel that never changes
        factor = normalized(half)
        if products:
            factor = choose_factor(
                half, rows.var(axis=0, dtype=np.float64), products, levels
            ).factor
        scale = 2 * float((half / factor).max()) / (levels - 1)
        zero = levels // 2
        shift = (low + high) / 2 + factor * scale * (zero - (levels - 1) / 2)
        self.note(site, low, high)
        return shift, factor, numbers(scale, zero)

    def products(
        self, linears: Iterable[ir.Node], order: NDArray[np.int64] | slice = slice(None)
    ) -> list[Product]:
        """Linears with the bits of their weights, of which those are left out that are no
        constants; ``order``: of their rows."""
        found = []
        for linear in linears:
            weight, held = weight_of(linear), linear.inputs[1]
            if weight is not None and held is not None:
                rule = self.rules.get(str(held.name))
                bits = BYTE if rule is None else rule.bits
                rows = ROWS if bits <= WIDEST else 0
                found.append(Product(np.abs(weight[order]), bits, rows))
        return found

    def note(self, site: Site, low: Double, high: Double) -> None:
        """How much less noise steps of single channels make than one step for all."""
        width = np.maximum(high - low, TINY)
        plain = float(high.max() - low.min())
        gain = 10 * float(np.log10(plain**2 / np.mean(width**2)))
        into = INTO.get(site.role, "LayerNormalization")
        ratio = float(width.max() / width.min())
        self.moves.append(Move(site.tensor, site.role, site.block, into, gain, ratio))

    def settle(self, site: Site, tensor: str, found: Solved) -> None:
        """Keep what a sample says of a tensor at the site; one of 8 bits or more has room for
        values that no sample has, and its range is that of all images instead."""
        if self.rules[site.tensor].bits < BYTE:
            self.solved[tensor] = found

    def behind(self, site: Site, value: ir.Value, shift: Double, factor: Double) -> ir.Value:
        """A Mul and an Add behind a value; they have the site's role."""
        with new_nodes_as(self.graph, Role(site.block, site.role), self.roles):
            return insert_affine(self.graph, value, shift, factor, "stepped")

    def linear_input(self, site: Site) -> None:
        """A norm's output, or what linears alone read."""
        value = self.values[site.tensor]
        norm = norm_before(value)
        linears = readers_of(value)
        if len(site.channel_axes) != 1 or (norm is None and linears is None):
            return
        readers = norm.linears if norm is not None else linears or ()
        shift, factor, solved = self.steps(site, self.products(readers))
        if norm is not None:
            norm.apply(self.graph, shift, factor)
            read = {str(v.name) for n in norm.linears if (v := n.inputs[0]) is not None}
            for tensor in sorted({site.tensor, *read} & {*self.rules}):
                self.settle(site, tensor, solved)
        elif linears is not None:
            made = self.behind(site, value, shift, factor)
            for linear in linears:
                move_rows(self.graph, linear, factor, shift)
            self.settle(site, str(made.name), solved)

    def hidden(self, site: Site) -> None:
        """What an activation function gives in 8 bits or more: factors by what channels reach in
        all images, as rare values that no sample has are most of the range of some."""
        value, bounds = self.values[site.tensor], self.ranges[site.tensor]
        linears = readers_of(value)
        if linears is None or len(site.channel_axes) != 1:
            return
        layer = hidden_channels(value, linears)
        variance = self.samples[site.tensor].var(axis=0, dtype=np.float64)
        products = self.products(linears)
        choice = choose_hidden_factor(layer, bounds, variance, products, self.levels(site))
        if choice.gain_db < WORTH_A_MUL:
            return
        factor, _ = with_copies(self.graph, layer, choice)
        shift = np.zeros(len(factor))
        self.behind(site, value, shift, factor)
        for linear in linears:
            move_rows(self.graph, linear, factor, shift)
        ratio = float(choice.factor.max() / choice.factor.min())
        more = len(factor) - len(choice.factor)
        moved = Move(site.tensor, site.role, site.block, "Mul", choice.gain_db, ratio, more)
        self.moves.append(moved)

    def activated(self, site: Site) -> None:
        """M, τ and zero point of what an activation function gives, weighted by the rows of the
        weights that read it; where channels are in pieces the largest code is their bound."""
        rows = self.samples[site.tensor]
        nodes = {name_of(n): n for n in self.graph}
        power = power_of_rows((nodes[name] for name in site.consumers), rows.shape[1])
        if not power.any():
            power += 1
        highest = self.form.fixed.get(site.tensor, (0.0, None))[1]
        bits = self.rules[site.tensor].bits
        self.solved[site.tensor] = logarithmic_range_of_rows(rows, power, bits, highest)


def numbers(scale: float, zero: int, details: Mapping[str, int] | None = None) -> Solved:
    """What a code needs, as arrays of one."""
    return Solved(np.array([scale], np.float32), np.array([zero], np.int32), details or {})


def weight_of(linear: ir.Node) -> Array | None:
    """[K, N]"""
    value = constant(linear.inputs[1])
    return None if value is None else np.asarray(value, np.float32)
