"""PTQ4ViT: twin-uniform codes for what softmax and GELU make, uniform ones around all products.

Source: Yuan et al., arXiv 2111.12293. The inputs and weights of the linears (patch embedding and
head included) and of both attention products are quantized; LayerNorm, softmax, GELU and the
residual stream are not. Activations have one symmetric step per tensor. Other than in the paper:

* weights have a step per output channel, not per tensor, head or group of heads;
* scales are those of ``--method``; the search of scales by the Hessian of the output is not done.
  ``--method pearson`` is the nearest to it: it searches by the products' outputs;
* the ratio of a softmax's two steps follows from E[x²] of the map on the calibration images
  (``numerics/codes/twin.py``), not from a search.

Twin codes have no integer kernel: the file reads their values from a table, and the products that
read them are computed in float.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from ptq_onnx.calibration.methods import Statistics
from ptq_onnx.numerics.codes.twin import Twin, attention_ratio
from ptq_onnx.numerics.fake_quantize import reach
from ptq_onnx.numerics.grain import PerChannel
from ptq_onnx.numerics.spec import Rule, Site, TensorSpec
from ptq_onnx.quantizers.base import SiteQuantizer

PRODUCTS = ("Linear", "MatMul", "Conv")
FLOAT = "stays float: only what products read is quantized"
FIXED = "fixed"
"""The method of an attention map: its range is [0, 1] by nature."""
TWIN = Twin()


class Ptq4Vit(SiteQuantizer):
    """Quantizes what products read; see the module's text."""

    name: ClassVar[str] = "ptq4vit"

    def rule(self, site: Site) -> Rule | str:
        """Twin-uniform codes for softmax and GELU, uniform ones for all else that products read."""
        widths, method = self.plan.config.widths, self.plan.config.effective_method
        readers = [self.nodes[name].op_type for name in site.consumers]
        if not readers or not all(kind in PRODUCTS for kind in readers):
            return FLOAT
        if site.is_parameter:
            return Rule(widths.weights, grain=PerChannel(), method="minmax")
        if site.role == "softmax":
            return Rule(widths.attention, False, False, code=TWIN, method=FIXED)
        made = None if site.producer is None else self.nodes[site.producer].op_type
        if made == "Gelu":
            return Rule(widths.activations, True, False, code=TWIN, method=method)
        return Rule(widths.activations, method=method)

    def activation(self, site: Site, rule: Rule, stats: Statistics) -> TensorSpec:
        """As the base does; a map's ratio by how far its weights lie below one."""
        spec = super().activation(site, rule, stats)
        if rule.method != FIXED:
            return spec
        ratio = attention_ratio(float(np.mean(stats.channels[site.tensor].second_moment)))
        scale = spec.scale * np.float32(2.0 ** (spec.details["ratio"] - ratio))
        spec = replace(spec, scale=scale, details={"ratio": ratio})
        return replace(spec, clip=reach(spec))
