"""Deploy: only what the runtime computes in int8 is quantized.

The inputs and weights of the products (patch embedding, linears, QKᵀ, A·V); LayerNorm,
softmax, GELU and the residual stream stay float, and so does every product's output, so
that ONNX Runtime fuses each product to one MatMulIntegerToFloat. Weights int8 per output
channel, activations 8 bits with one scale per tensor, with or without a sign as the target
takes them (``targets.py``): what differs between channels is the
business of equalisation (``equalization/``), which goes before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.calibration import ChannelStatistics, Statistics
from ptq_onnx.calibration.robust import shared_range
from ptq_onnx.errors import ConfigError
from ptq_onnx.export.lowering import rows_of
from ptq_onnx.fusion.formula import constant
from ptq_onnx.quantizers.base import Array, SiteQuantizer
from ptq_onnx.quantizers.correction import corrected_biases, start_of
from ptq_onnx.quantizers.rounded import rounded_weights
from ptq_onnx.spec import Granularity, Rule, Site, TensorSpec

PRODUCTS = ("Linear", "MatMul")
ALONE = "stays float: another input of the product that reads it does"
FLOAT = "stays float: the runtime computes it in float, only products take integers"


class Deploy(SiteQuantizer):
    """Quantizes what products read; see the module's text."""

    name: ClassVar[str] = "deploy"

    def rule(self, site: Site) -> Rule | str:
        if site.role == "pos_embed":
            return FLOAT
        if not site.is_parameter and not self._read_by_product(site):
            return FLOAT
        widths = self.plan.config.widths
        if site.is_parameter:
            if not self._read_by_product(site):
                return FLOAT
            return Rule(widths.weights, True, True, "channel", method="minmax")
        method = self.plan.config.effective_method
        target = self.plan.config.runtime
        if site.role == "softmax":
            sign = target.signed_attention
            grain: Granularity = "row" if target.rows else "tensor"
            stored = target.stored(sign)
            return Rule(widths.attention, sign, sign, grain, method="fixed", stored=stored)
        products = [self.nodes[name].op_type for name in site.consumers]
        sign = target.symmetric
        if "MatMul" in products:
            sign = target.symmetric_attention
        stored = target.stored(sign)
        return Rule(widths.activations, sign, sign, "tensor", method=method, stored=stored)

    def _dispatch(self) -> dict[str, Rule]:
        """Rules of tensors whose products are in integers: with all inputs, or not at all."""
        rules = super()._dispatch()
        sites = self.plan.sites
        while True:
            inputs = Counter(
                name
                for tensor in rules
                for name in sites[tensor].consumers
                if not sites[tensor].is_parameter
            )
            for name in inputs:  # a weight that several linears share is one site
                weight = self.nodes[name].inputs[1]
                tensor = "" if weight is None else str(weight.name)
                inputs[name] += tensor in rules and sites[tensor].is_parameter
            whole = {name for name, count in inputs.items() if count == 2}
            lost = [t for t in rules if not whole.issuperset(sites[t].consumers)]
            if not lost:
                return rules
            for tensor in lost:
                del rules[tensor]
                self.floats[tensor] = ALONE

    def bounds(self, site: Site, rule: Rule, stats: Statistics) -> tuple[Array, Array]:
        """With ``robust``: one range for all channels, by the weights that read them."""
        if rule.method != "robust" or rule.granularity != "tensor":
            return super().bounds(site, rule, stats)
        found = stats.channels[site.tensor]
        power = self._row_power(site, found)
        smallest, largest = rule.limits
        low, high = shared_range(
            found,
            power,
            largest - smallest + 1,
            symmetric=rule.symmetric,
            exponent=self.plan.exponents.get(site.tensor, 0.0),
        )
        return np.array([low], np.float32), np.array([high], np.float32)

    def _row_power(self, site: Site, stats: ChannelStatistics) -> NDArray[np.float64]:
        """Σ_n W² of the weights behind each channel; ones where channels are not their rows."""
        total = np.zeros(stats.power.size)
        for name in site.consumers:
            node = self.nodes[name]
            weight, read = constant(node.inputs[1]), node.inputs[0]
            if node.op_type != "Linear" or weight is None or read is None:
                return np.ones(stats.power.size)
            start = start_of(read, site.tensor)
            index = np.arange(stats.power.size, dtype=np.float32).reshape(stats.shape)
            rows = None if start is None else rows_of(start, read, index)
            if rows is None or len(rows) != len(weight):
                return np.ones(stats.power.size)
            power = np.sum(weight.astype(np.float64) ** 2, axis=1)
            np.add.at(total, rows.astype(np.int64), power)
        return total

    def calibrate(self, batches: Iterable[Any]) -> dict[str, TensorSpec]:
        """Specs; then the weights are rounded, and the biases corrected for what that left."""
        if self._given is not None:
            return super().calibrate(batches)
        stats = self.measure(batches)
        specs = self.searched(self.solve(stats), batches)
        constants, notes = rounded_weights(self.plan, specs, stats, batches)
        self.notes.extend(notes)
        if self.plan.config.bias_correction:
            sites = self.plan.sites
            constants |= corrected_biases(self.plan.model, sites, specs, stats, constants)
        self.set_constants(constants)
        return specs

    def reuse(self, specs: dict[str, TensorSpec], where: str) -> None:
        config = self.plan.config
        for option, used, without in (
            (f"--rounding {config.rounding}", config.rounding != "nearest", "--rounding nearest"),
            ("bias correction", config.bias_correction, "--no-bias-correction"),
        ):
            if used:
                raise ConfigError(
                    f"--scales {where}: {option} needs the images; calibrate anew, or use"
                    f" {without}."
                )
        super().reuse(specs, where)

    def _read_by_product(self, site: Site) -> bool:
        products = (*PRODUCTS, "Conv") if self.plan.config.runtime.convolutions else PRODUCTS
        kinds = [self.nodes[name].op_type for name in site.consumers]
        return bool(kinds) and all(kind in products for kind in kinds)
