"""The patch embedding: a Conv whose kernel is its stride. Its bias may be an Add behind it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ptq_onnx.fusion.rule import Context, Op, Result, Rule, Term, fuse_with
from ptq_onnx.graph.formula import constant, new_constant


class ConvBias(Rule):
    """Conv without a bias, plus a constant per channel, [C, 1, 1] or [1, C, 1, 1]."""

    def pattern(self, op: Op, x: Term, w: Term, b: Term) -> Term:
        """Conv(x, W) + b"""
        return op.Add(op.Conv(x, w, _allow_other_attributes=True, _outputs=["conv"]), b)

    def check(
        self, context: Context, w: ir.Value, b: ir.Value, conv: ir.Value, **_: object
    ) -> Result:
        """Fails unless W and b are constants, b float32 with one number for each output channel."""
        result = self.begin(context)
        weight, bias, node = constant(w), constant(b), conv.producer()
        if weight is None or bias is None or node is None:
            return result.fail("Weight and bias must be constants.", b)
        channels = (weight.shape[0], *(1,) * (weight.ndim - 2))
        if bias.dtype != np.float32 or bias.shape not in (channels, (1, *channels)):
            return result.fail("The bias must be [C, 1, 1].", b)
        self.bias, self.attributes = bias, dict(node.attributes)
        return result

    def rewrite(self, op: Op, x: ir.Value, w: ir.Value, b: ir.Value, **_: object) -> ir.Value:
        """The Conv with b [C] as its bias."""
        flat = new_constant(self.graph, f"{b.name}_flat", self.bias.reshape(-1))
        return self.named(op.Conv(x, w, flat, **self.attributes))


fuse_conv_bias = fuse_with(ConvBias)


def count_patch_embeds(model: ir.Model) -> int:
    """The number of patch embeddings; they stay a Conv."""
    return sum(is_patch_embed(node) for node in model.graph)


def is_patch_embed(node: ir.Node) -> bool:
    """True for a Conv with kernel = stride, no padding, one group, no dilation."""
    weight = constant(node.inputs[1]) if node.op_type == "Conv" else None
    if weight is None:
        return False
    attributes = node.attributes
    return (
        tuple(attributes.get_ints("strides", ())) == weight.shape[2:]
        and not any(attributes.get_ints("pads", ()))
        and attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and attributes.get_int("group", 1) == 1
        and set(attributes.get_ints("dilations", (1,))) == {1}
    )
