"""Deploy: only what the runtime computes in int8 is quantized.

The inputs and weights of the products (patch embedding, linears, QKᵀ, A·V); LayerNorm,
softmax, GELU and the residual stream stay float, and so does every product's output, so
that ONNX Runtime fuses each product to one MatMulIntegerToFloat. Weights int8 per output
channel, activations uint8, with the power-of-two factors of fqvit, which are exact in
float: from LayerNorm's γ, β and from GELU into the next weight, from v through A·V into
proj, between q and k. How far a factor goes is chosen per site by the expected error of
the product's output, the weight's rounding included.
"""

from __future__ import annotations

from typing import ClassVar

from ptq_onnx.quantizers.fqvit import PER_TENSOR, FqVit
from ptq_onnx.spec import Granularity, Rule, Site

PRODUCTS = ("Linear", "Conv", "MatMul")
FLOAT = "stays float: the runtime computes it in float, only products take integers"


class Deploy(FqVit):
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
        if site.role == "softmax":
            method = self.plan.config.effective_method
            return Rule(widths.attention, False, False, "tensor", method=method)
        wide = self.plan.config.ptf and site.role not in PER_TENSOR and bool(site.channel_axes)
        grain: Granularity = "ptf" if wide else "tensor"
        method = self.plan.config.effective_method
        return Rule(widths.activations, False, False, grain, method=method)

    def _read_by_product(self, site: Site) -> bool:
        kinds = [self.nodes[name].op_type for name in site.consumers]
        return bool(kinds) and all(kind in PRODUCTS for kind in kinds)
