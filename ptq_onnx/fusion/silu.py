"""Silu, x·sigmoid(x), the gate of SwiGLU: an op of ours, standard ONNX has it from opset 24 on."""

from __future__ import annotations

import onnx_ir as ir

from ptq_onnx.fusion.rule import Context, Op, Result, Rule, Term, fuse_with
from ptq_onnx.graph.formula import DOMAIN


class Silu(Rule):
    """x times its own sigmoid."""

    def pattern(self, op: Op, x: Term) -> Term:
        """x · sigmoid(x)"""
        return op.Mul(x, op.Sigmoid(x))

    def check(self, context: Context, x: ir.Value) -> Result:
        """Fails where x is known to be no float32."""
        result = self.begin(context)
        if x.dtype not in (None, ir.DataType.FLOAT):
            return result.fail("x must be float.", x)
        return result

    def rewrite(self, op: Op, x: ir.Value) -> ir.Value:
        """One Silu of our own domain."""
        return self.named(op.Silu(x, _domain=DOMAIN, _version=1))


fuse_silu = fuse_with(Silu)
