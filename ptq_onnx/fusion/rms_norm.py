"""RMSNormalization from its decomposed form: x/√(mean x² + ε)·γ over the last axis.

The op is ours (domain ``ptq_onnx``): standard ONNX has it from opset 23 on only.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter import pattern

from ptq_onnx.fusion.layer_norm import is_over_last_axis, is_per_channel
from ptq_onnx.fusion.rule import Context, Op, Result, Rule, Term, fuse_with
from ptq_onnx.graph.formula import DOMAIN, constant, scalar, sizes


class _RmsNorm(Rule):
    """The quotient times γ; subclasses say how the quotient is spelled."""

    power = 0.5

    def shifted(self, op: Op, x: Term, epsilon: Term, square: Term) -> Term:
        """mean x² + ε"""
        squared = pattern.OrValue([op.Mul(x, x), op.Pow(x, square)])
        mean = op.ReduceMean(
            squared, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["mean"]
        )
        return op.Add(mean, epsilon)

    def check(
        self,
        context: Context,
        x: ir.Value,
        epsilon: ir.Value,
        gamma: ir.Value,
        mean: ir.Value,
        square: ir.Value | None = None,
        power: ir.Value | None = None,
        one: ir.Value | None = None,
    ) -> Result:
        result = self.begin(context)
        dims, scale = sizes(x), constant(gamma)
        if dims is None or not dims or not isinstance(dims[-1], int):
            return result.fail("The last axis of x must have a known size.", x)
        if not is_over_last_axis(mean, len(dims)):
            return result.fail("The mean must be over the last axis, keepdims=1.", mean)
        for value, expected in ((square, 2.0), (power, self.power), (one, 1.0)):
            if value is not None and scalar(value) != expected:
                return result.fail(f"The constant must be {expected}.", value)
        found = scalar(epsilon)
        if found is None or not 0.0 <= found < 1.0:
            return result.fail("Epsilon must be one small constant.", epsilon)
        if scale is None or not is_per_channel(gamma, x, dims[-1]):
            return result.fail("Gamma must be a constant, one number for each channel.", gamma)
        if _is_centred(x):
            return result.fail("x has its mean taken off: part of a LayerNorm.", x)
        self.epsilon = found
        return result

    def rewrite(self, op: Op, x: ir.Value, gamma: ir.Value, **_: object) -> ir.Value:
        return self.named(
            op.RMSNormalization(x, gamma, epsilon=self.epsilon, _domain=DOMAIN, _version=1)
        )


class RmsNormDiv(_RmsNorm):
    """γ · x / √(…)"""

    def pattern(
        self, op: Op, x: Term, epsilon: Term, square: Term, power: Term, gamma: Term
    ) -> Term:
        """x / √(mean(x²) + ε) · γ, the root as Sqrt or as Pow."""
        shifted = self.shifted(op, x, epsilon, square)
        root = pattern.OrValue([op.Sqrt(shifted), op.Pow(shifted, power)])
        return op.Mul(op.Div(x, root), gamma)


class RmsNormMul(_RmsNorm):
    """γ · (x · 1/√(…))"""

    power = -0.5

    def pattern(
        self, op: Op, x: Term, epsilon: Term, square: Term, power: Term, one: Term, gamma: Term
    ) -> Term:
        """x · 1/√(mean(x²) + ε) · γ, the second factor a Reciprocal, a Div or a Pow."""
        shifted = self.shifted(op, x, epsilon, square)
        spellings = (
            op.Reciprocal(op.Sqrt(shifted)),
            op.Div(one, op.Sqrt(shifted)),
            op.Pow(shifted, power),
        )
        return op.Mul(op.Mul(x, pattern.OrValue(spellings)), gamma)


def _is_centred(x: ir.Value) -> bool:
    node = x.producer()
    if node is None or node.op_type != "Sub" or node.inputs[1] is None:
        return False
    mean = node.inputs[1].producer()
    return mean is not None and mean.op_type == "ReduceMean"


fuse_rms_norm = fuse_with(RmsNormDiv, RmsNormMul)
