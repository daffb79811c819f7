"""Equalisation between convolutions: which factor, and what becomes of the statistics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.regions import Regions
from ptq_onnx.blocks.roles import Role
from ptq_onnx.calibration.methods import Statistics
from ptq_onnx.equalization.factor_search import Choice, Product
from ptq_onnx.equalization.foldings import new_nodes_as
from ptq_onnx.equalization.gates import Gated, Leaving, Source, choose_factors, in_steps, sources
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.spec import Site
from ptq_onnx.quantizers.code_regions import least

Double = NDArray[np.float64]
WORTH_A_MUL = 0.5
"""dB of expected noise that a factor must save where it costs a Mul at run time."""


class ConvolutionSteps:
    """The steps between convolutions, of one that equalises a model in place."""

    model: ir.Model
    sites: dict[str, Site]
    stats: Statistics
    levels: int
    weight_bits: int
    roles: dict[str, Role]

    def bounds(self, tensor: str) -> tuple[Double, Double]:
        """Lower and upper bound of each channel [C]."""
        raise NotImplementedError

    def unshifted(self, low: Double, high: Double, symmetric: bool) -> Double:
        """Half of the range that a channel takes up where all share one zero point."""
        raise NotImplementedError

    def move_statistics(self, tensor: str, shift: Double, factor: Double, name: str = "") -> None:
        """Let the statistics of a tensor, or those of ``name`` after them, be of (x - shift) /
        factor."""
        raise NotImplementedError

    def note(self, site: Site, into: str, choice: Choice) -> None:
        """Add what was moved at a site to the list of moves."""
        raise NotImplementedError

    def convolutions(self, regions: Regions) -> None:
        """What stands between convolutions on codes (``gates.py``)."""
        for one in sources(regions):
            site = self.sites.get(str(one.value.name))
            measured = [str(v.name) for v in one.made if str(v.name) in self.stats.channels]
            if site is None or site.tensor not in measured:
                continue
            bounds = {tensor: self.bounds(tensor) for tensor in measured}
            shape = one.value.shape  # of some tensors the channels counted are on another axis
            if shape is None or any(len(low) != shape[1] for low, _ in bounds.values()):
                continue
            slope = one.slope if isinstance(one, Gated) else 1.0
            dead = least(one.value) if isinstance(one, (Gated, Leaving)) else -np.inf
            if np.isfinite(dead):
                low, high = bounds[site.tensor]
                low = np.maximum(low, dead)
                bounds[site.tensor] = low, np.maximum(high, low)
            half = [self.unshifted(*pair, symmetric=False) for pair in bounds.values()]
            half[0] = slope * half[0]
            variance = self.stats.channels[measured[min(1, len(measured) - 1)]].variance
            dense = [n for n in one.carried.readers if n.attributes.get_int("group", 1) == 1]
            weights = self.of_convolutions(dense)
            choice = choose_factors(half[0], half[1:], variance, weights, self.levels)
            if one.costs and choice.gain_db < WORTH_A_MUL:
                continue
            self.divide(site, one, measured, choice, dead)

    def divide(
        self, site: Site, one: Source, measured: list[str], choice: Choice, dead: float
    ) -> None:
        """Write the factor of one tensor between convolutions, and move the statistics. Below
        ``dead`` what reads the tensor makes zero."""
        before, factor = self.stats.channels[site.tensor], choice.factor
        if isinstance(one, Gated):
            factor = in_steps(factor)
        with new_nodes_as(self.model.graph, Role(site.block, site.role), self.roles):
            new = one.divide(self.model.graph, factor)
            one.carried.take_in(self.model.graph, factor)
        zero = np.zeros(len(factor))
        for name, old in new.items():
            if old in self.stats.channels:
                self.move_statistics(old, zero, factor, name)
        for tensor in set(measured) - set(new.values()):
            self.move_statistics(tensor, zero, factor)
        if isinstance(one, Gated):
            self.stats.channels[one.whole] = before
        if np.isfinite(dead):
            moved = self.stats.channels[site.tensor]
            lowest = np.maximum(moved.lowest, np.float32(dead) / factor.astype(np.float32))
            self.stats.channels[site.tensor] = replace(moved, lowest=lowest)
        self.note(site, one.name, replace(choice, factor=factor))

    def of_convolutions(self, nodes: Iterable[ir.Node]) -> list[Product]:
        """The magnitudes of convolutions of one group, [C, N · pixels], for the search."""
        found = [constant(node.inputs[1]) for node in nodes]
        return [
            Product(
                np.abs(np.moveaxis(w, 1, 0).reshape(w.shape[1], -1)).astype(np.float32),
                self.weight_bits,
            )
            for w in found
            if w is not None
        ]
