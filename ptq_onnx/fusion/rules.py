"""Fusion: the ops of a Vision Transformer from what an exporter made of them."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import onnx_ir.passes.common as common

from ptq_onnx.fusion.attention import fuse_attention_order, fuse_attention_scale, split_mask
from ptq_onnx.fusion.batch_norm import fuse_linear_batch_norm
from ptq_onnx.fusion.conv_affine import fuse_conv_affine
from ptq_onnx.fusion.gelu import fuse_gelu, fuse_quick_gelu
from ptq_onnx.fusion.hard_swish import fuse_hard_swish
from ptq_onnx.fusion.l2_norm import fuse_l2_norm
from ptq_onnx.fusion.layer_norm import fuse_layer_norm
from ptq_onnx.fusion.linear import fuse_linear
from ptq_onnx.fusion.normalisation import fold_normalisation
from ptq_onnx.fusion.patch_embed import count_patch_embeds, fuse_conv_bias
from ptq_onnx.fusion.rms_norm import fuse_rms_norm
from ptq_onnx.fusion.silu import fuse_silu

RULES: tuple[tuple[str, Callable[[ir.Model], int]], ...] = (
    ("LayerNormalization", fuse_layer_norm),
    ("RMSNormalization", fuse_rms_norm),
    ("L2Normalization", fuse_l2_norm),
    ("Gelu", fuse_gelu),
    ("QuickGelu", fuse_quick_gelu),
    ("Silu", fuse_silu),
    ("HardSwish", fuse_hard_swish),
    ("AttentionOrder", fuse_attention_order),
    ("AttentionScale", fuse_attention_scale),
    ("AttentionMask", split_mask),
    ("ConvBias", fuse_conv_bias),
    ("Normalisation", fold_normalisation),
    ("ConvAffine", fuse_conv_affine),
    ("Linear", fuse_linear),
    ("LinearBatchNorm", fuse_linear_batch_norm),
    ("PatchEmbed", count_patch_embeds),
)
"""The rule families in the order they run. ``PatchEmbed`` only counts; all others rewrite."""


def fuse(model: ir.Model) -> dict[str, int]:
    """Fuse the cleaned graph in place; returns how often each rule fired, by name."""
    counts = {name: rule(model) for name, rule in RULES}
    common.RemoveUnusedNodesPass()(model)
    return counts


__all__ = ["RULES", "fuse"]
