"""Vanilla: int8 [-128, 127], per tensor, symmetric, percentile: the baseline.

Source: PTQ2TheMoon's baseline on PPQ (its shipped code left the scales dynamic, and so
ignored the percentile; these are fixed).
"""

from __future__ import annotations

from typing import ClassVar

from ptq_onnx.numerics.spec import Rule, Site
from ptq_onnx.quantizers.base import SiteQuantizer


class Vanilla(SiteQuantizer):
    """Conv, linears, products, LayerNorm, GELU, softmax and adds, all alike."""

    name: ClassVar[str] = "vanilla"

    def rule(self, site: Site) -> Rule | str:
        """Symmetric signed codes with one scale, for every site."""
        config = self.plan.config
        bits = config.widths.activations
        if site.is_parameter:
            bits = config.widths.weights
        elif site.role == "softmax":
            bits = config.widths.attention
        return Rule(bits=bits, signed=True, symmetric=True, method=config.effective_method)
