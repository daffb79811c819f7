"""Deploy: only what the runtime computes in int8 is quantized.

The inputs and weights of the products (patch embedding, linears, QKᵀ, A·V); LayerNorm,
softmax, GELU and the residual stream stay float, and so does every product's output, so
that ONNX Runtime fuses each product to one MatMulIntegerToFloat. Weights int8 per output
channel, activations uint8 with one scale per tensor: what differs between channels is the
business of equalisation (``equalization/``), which goes before.
"""

from __future__ import annotations

from typing import ClassVar

from ptq_onnx.calibration import Statistics
from ptq_onnx.quantizers.base import SiteQuantizer
from ptq_onnx.quantizers.correction import corrected_biases
from ptq_onnx.spec import Rule, Site, TensorSpec

PRODUCTS = ("Linear", "Conv", "MatMul")
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
            return Rule(widths.weights, True, True, "channel", method="minmax")
        method = self.plan.config.effective_method
        if site.role == "softmax":
            return Rule(widths.attention, False, False, "row", method="fixed")
        return Rule(widths.activations, False, False, "tensor", method=method)

    def solve(self, stats: Statistics) -> dict[str, TensorSpec]:
        specs = super().solve(stats)
        if self.plan.config.bias_correction:
            biases = corrected_biases(self.model, self.plan.sites, specs, stats)
            self.set_constants(biases)
        return specs

    def _read_by_product(self, site: Site) -> bool:
        kinds = [self.nodes[name].op_type for name in site.consumers]
        return bool(kinds) and all(kind in PRODUCTS for kind in kinds)
