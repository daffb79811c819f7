"""L2Normalization, x / max(|x|, ε) over the last axis: the q and k of cosine attention.

An op of ours: ONNX's LpNormalization has no ε.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter import pattern

from ptq_onnx.fusion.rule import Context, Op, Result, Rule, Term, fuse_with
from ptq_onnx.graph.formula import DOMAIN, constant, scalar, sizes


class L2Norm(Rule):
    """torch's ``normalize``: the norm, held above ε, under x."""

    def pattern(self, op: Op, x: Term, epsilon: Term) -> Term:
        """x / max(‖x‖₂, ε), the maximum as Max or as Clip."""
        norm = op.ReduceL2(
            x, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["norm"]
        )
        held = pattern.OrValue(
            [op.Clip(norm, epsilon, _allow_other_inputs=True), op.Max(norm, epsilon)]
        )
        return op.Div(x, held)

    def check(self, context: Context, x: ir.Value, epsilon: ir.Value, norm: ir.Value) -> Result:
        """Fails unless the norm is over the last axis, which it keeps, and ε is one constant in [0,
        1)."""
        result = self.begin(context)
        dims, found, node = sizes(x), scalar(epsilon), norm.producer()
        clip = None if self.root.inputs[1] is None else self.root.inputs[1].producer()
        if clip is not None and any(v is not None for v in clip.inputs[2:]):
            return result.fail("The norm must not be held below anything.", norm)
        if found is None or not 0.0 <= found < 1.0:
            return result.fail("Epsilon must be one small constant.", epsilon)
        if dims is None or node is None or node.attributes.get_int("keepdims", 1) != 1:
            return result.fail("The norm must keep its axis.", norm)
        axes = node.attributes.get_ints("axes")
        if axes is None and len(node.inputs) > 1:
            array = constant(node.inputs[1])
            axes = None if array is None else [int(a) for a in array.reshape(-1)]
        if axes is None or [a % len(dims) for a in axes] != [len(dims) - 1]:
            return result.fail("The norm must be over the last axis.", norm)
        self.epsilon = found
        return result

    def rewrite(self, op: Op, x: ir.Value, **_: object) -> ir.Value:
        """One L2Normalization of our own domain."""
        return self.named(op.L2Normalization(x, epsilon=self.epsilon, _domain=DOMAIN, _version=1))


fuse_l2_norm = fuse_with(L2Norm)
