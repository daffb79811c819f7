"""Deploy with ``--weights 4``: linears' weights in blocks of 4-bit codes, all else in float.

A standard DequantizeLinear with ``block_size`` in front of each linear, which ONNX Runtime fuses
to MatMulNBits. Its kernel keeps the weights in 4 bits and, by default, rounds every row of the
input to 8 bits per block while it runs (accuracy level 4; measured 44 to 47 dB per product with
1.31; the session option ``session.qdq_matmulnbits_accuracy_level`` 1 computes in float).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.calibration.methods import Statistics, collect
from ptq_onnx.config import stages
from ptq_onnx.numerics.blockwise import BLOCK, block_grid
from ptq_onnx.numerics.grain import Blocks
from ptq_onnx.numerics.spec import Rule, Site, TensorSpec
from ptq_onnx.progress import untold
from ptq_onnx.quantizers.base import SiteQuantizer
from ptq_onnx.quantizers.correction import corrected_mean, input_power
from ptq_onnx.quantizers.deploy import Deploy

FLOAT = "stays float: with --weights 4 only the weights of linears have codes"


class WeightOnly(Deploy):
    """Quantizes the weights of linears; see the module's text."""

    def rule(self, site: Site) -> Rule | str:
        """4-bit codes in blocks of rows for weights of linears; all else stays in float."""
        if not site.is_parameter or not all(is_linear(self.nodes[n]) for n in site.consumers):
            return FLOAT
        bits = self.plan.config.weights
        return Rule(bits, False, False, Blocks(BLOCK), method="mse")

    def _dispatch(self) -> dict[str, Rule]:
        return SiteQuantizer._dispatch(self)

    def measure(self, batches: Iterable[Any]) -> Statistics:
        """Statistics of what the linears with codes read."""
        plan = self.plan
        read = {n for t in self.rules for n in plan.sites[t].consumers}
        sites = [s for s in plan.sites.values() if not s.is_parameter and read & {*s.consumers}]
        report = plan.progress or untold
        return collect(
            plan.model,
            sites,
            batches,
            threads=plan.config.threads,
            workers=plan.config.workers,
            progress=report(stages.CALIBRATING),
        )

    def solve(self, stats: Statistics) -> dict[str, TensorSpec]:
        """Scale and zero point of each block, searched by the error weighted with the power of the
        weight's inputs where statistics have it."""
        specs = {}
        for tensor, rule in self.rules.items():
            site, weight = self.plan.sites[tensor], self.constant(tensor)
            scale, zero = block_grid(
                weight, rule.bits, self._power(site, stats), rule.grain.block_size
            )
            clip = float(weight.min(initial=0)), float(weight.max(initial=0))
            specs[tensor] = TensorSpec(tensor, rule, scale, zero, axis=0, clip=clip)
        return specs

    def _power(self, site: Site, stats: Statistics) -> NDArray[np.float64] | None:
        """E[x²] of what the weight's rows are multiplied with, [K]; the variance where the bias
        takes the mean's part of the error; None where it was not measured."""
        total: NDArray[np.float64] | None = None
        for name in site.consumers:
            node = self.nodes[name]
            sites = self.plan.sites
            corrected = corrected_mean(node, sites, stats) is not None
            centred = self.plan.config.bias_correction and corrected
            power = input_power(node, sites, stats, centred=centred)
            if power is None:
                return None
            total = power if total is None else total + power
        return total
