"""LayerNormalization from its decomposed form: (x − μ)/√(σ² + ε)·γ + β over the last axis."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

from ptq_onnx.fusion.rule import Context, Op, Result, Rule, Term, fuse_with
from ptq_onnx.graph.formula import constant, new_constant, scalar, sizes


class _LayerNorm(Rule):
    """The normalisation alone; the scale it needs is a new constant of ones.

    ``x − μ`` may be computed once or twice (two patterns may match one node), the square is
    ``Pow(d, 2)`` or ``Mul(d, d)``; subclasses say how the quotient is spelled.
    """

    power = 0.5
    """The exponent where the root is spelled as Pow."""

    def parts(self, op: Op, x: Term, epsilon: Term, square: Term) -> tuple[Term, Term]:
        """x − μ and σ² + ε"""
        mean = op.ReduceMean(
            x, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["mean"]
        )
        squared = pattern.OrValue(
            [op.Mul(op.Sub(x, mean), op.Sub(x, mean)), op.Pow(op.Sub(x, mean), square)]
        )
        variance = op.ReduceMean(
            squared, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["variance"]
        )
        return op.Sub(x, mean), op.Add(variance, epsilon)

    def check(
        self,
        context: Context,
        x: ir.Value,
        epsilon: ir.Value,
        mean: ir.Value,
        variance: ir.Value,
        square: ir.Value | None = None,
        power: ir.Value | None = None,
        one: ir.Value | None = None,
    ) -> Result:
        result = self.begin(context)
        dims = sizes(x)
        if dims is None or not dims or not isinstance(dims[-1], int):
            return result.fail("The last axis of x must have a known size.", x)
        for reduced in (mean, variance):
            if not is_over_last_axis(reduced, len(dims)):
                return result.fail("The mean must be over the last axis, keepdims=1.", reduced)
        for value, expected in ((square, 2.0), (power, self.power), (one, 1.0)):
            if value is not None and scalar(value) != expected:
                return result.fail(f"The constant must be {expected}.", value)
        found = scalar(epsilon)
        if found is None or not 0.0 <= found < 1.0:
            return result.fail("Epsilon must be one small constant.", epsilon)
        self.epsilon, self.size = found, dims[-1]
        return result

    def rewrite(self, op: Op, x: ir.Value, **_: object) -> ir.Value:
        name = f"{self.root.outputs[0].name}_scale"
        scale = new_constant(self.graph, name, np.ones(self.size, np.float32))
        return self.named(op.LayerNormalization(x, scale, axis=-1, epsilon=self.epsilon))


class LayerNormDiv(_LayerNorm):
    """d / √(σ² + ε)"""

    def pattern(self, op: Op, x: Term, epsilon: Term, square: Term, power: Term) -> Term:
        """d / √(σ² + ε), the root as Sqrt or as Pow."""
        deviation, shifted = self.parts(op, x, epsilon, square)
        return op.Div(deviation, pattern.OrValue([op.Sqrt(shifted), op.Pow(shifted, power)]))


class LayerNormMul(_LayerNorm):
    """d · 1/√(σ² + ε), the second factor a Reciprocal, a Div or a Pow"""

    power = -0.5

    def pattern(self, op: Op, x: Term, epsilon: Term, square: Term, power: Term, one: Term) -> Term:
        """d · 1/√(σ² + ε), in any of its spellings."""
        deviation, shifted = self.parts(op, x, epsilon, square)
        spellings = (
            op.Reciprocal(op.Sqrt(shifted)),
            op.Div(one, op.Sqrt(shifted)),
            op.Pow(shifted, power),
        )
        return op.Mul(deviation, pattern.OrValue(spellings))


class LayerNormAffine(_LayerNorm):
    """x·s + (β − μ·s) with s = γ/√(σ² + ε), as TensorFlow writes it: γ and β are inside."""

    power = -0.5

    def pattern(
        self,
        op: Op,
        x: Term,
        epsilon: Term,
        square: Term,
        power: Term,
        one: Term,
        gamma: Term,
        beta: Term,
    ) -> Term:
        """x·s + (β − μ·s) with s = γ/√(σ² + ε)."""
        mean = op.ReduceMean(
            x, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["mean"]
        )
        squared = pattern.OrValue(
            [op.Mul(op.Sub(x, mean), op.Sub(x, mean)), op.Pow(op.Sub(x, mean), square)]
        )
        variance = op.ReduceMean(
            squared, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["variance"]
        )
        shifted = op.Add(variance, epsilon)
        spellings = (
            op.Reciprocal(op.Sqrt(shifted)),
            op.Div(one, op.Sqrt(shifted)),
            op.Pow(shifted, power),
        )
        scale = op.Mul(pattern.OrValue(spellings), gamma)
        return op.Add(op.Mul(x, scale), self.offset(op, beta, mean, scale))

    def offset(self, op: Op, beta: Term, mean: Term, scale: Term) -> Term:
        """β - μ·s"""
        return op.Sub(beta, op.Mul(mean, scale))

    def check(  # type: ignore[override]
        self, context: Context, x: ir.Value, gamma: ir.Value, beta: ir.Value, **parts: ir.Value
    ) -> Result:
        """As of any LayerNorm; also fails unless γ and β are constants, one number for each
        channel."""
        result = super().check(context, x, **parts)
        if not result:
            return result
        for value, name in ((gamma, "Gamma"), (beta, "Beta")):
            if not is_per_channel(value, x, self.size):
                return result.fail(f"{name} must be a constant, one number a channel.", value)
        return result

    def rewrite(  # type: ignore[override]
        self, op: Op, x: ir.Value, gamma: ir.Value, beta: ir.Value, **_: object
    ) -> ir.Value:
        """One LayerNormalization with γ and β [C]."""
        flat = [_flat(self.graph, value) for value in (gamma, beta)]
        return self.named(op.LayerNormalization(x, *flat, axis=-1, epsilon=self.epsilon))


class LayerNormNegated(LayerNormAffine):
    """The same with (-μ)·s + β, as Keras 3 writes it."""

    def offset(self, op: Op, beta: Term, mean: Term, scale: Term) -> Term:
        """(−μ)·s + β"""
        return op.Add(op.Mul(op.Neg(mean), scale), beta)


class Gamma(Rule):
    """LayerNormalization without a scale of its own, times γ."""

    def pattern(self, op: Op, x: Term, ones: Term, gamma: Term) -> Term:
        """A LayerNormalization, times γ."""
        return op.Mul(
            op.LayerNormalization(x, ones, _allow_other_attributes=True, _outputs=["norm"]), gamma
        )

    def check(
        self, context: Context, ones: ir.Value, gamma: ir.Value, norm: ir.Value, **_: object
    ) -> Result:
        """Fails where the norm has a scale other than ones, or γ is not one number for each
        channel."""
        result = self.begin(context)
        scale = constant(ones)
        if scale is None or not (scale == 1).all():
            return result.fail("The norm has a scale already.", ones)
        if not is_per_channel(gamma, norm, scale.size):
            return result.fail("Gamma must be a constant, one number for each channel.", gamma)
        return result

    def rewrite(
        self, op: Op, x: ir.Value, gamma: ir.Value, norm: ir.Value, **_: object
    ) -> ir.Value:
        """The norm with γ as its scale [C]."""
        flat = _flat(self.graph, gamma)
        return self.named(op.LayerNormalization(x, flat, **_attributes(norm)))


class Beta(Rule):
    """LayerNormalization without a bias, plus β."""

    def pattern(self, op: Op, x: Term, scale: Term, beta: Term) -> Term:
        """A LayerNormalization without a bias, plus β."""
        return op.Add(
            op.LayerNormalization(x, scale, _allow_other_attributes=True, _outputs=["norm"]), beta
        )

    def check(
        self, context: Context, scale: ir.Value, beta: ir.Value, norm: ir.Value, **_: object
    ) -> Result:
        """Fails where β is not one number for each channel."""
        result = self.begin(context)
        found = constant(scale)
        if found is None or not is_per_channel(beta, norm, found.size):
            return result.fail("Beta must be a constant, one number for each channel.", beta)
        return result

    def rewrite(
        self, op: Op, x: ir.Value, scale: ir.Value, beta: ir.Value, norm: ir.Value
    ) -> ir.Value:
        """The norm with β as its bias [C]."""
        flat = _flat(self.graph, beta)
        return self.named(op.LayerNormalization(x, scale, flat, **_attributes(norm)))


def is_over_last_axis(reduced: ir.Value, rank: int) -> bool:
    """True for the result of a ReduceMean over the last axis alone that keeps it."""
    node = reduced.producer()
    if node is None or node.attributes.get_int("keepdims", 1) != 1:
        return False
    axes = node.attributes.get_ints("axes")
    if axes is None and len(node.inputs) > 1:
        array = constant(node.inputs[1])
        axes = None if array is None else [int(a) for a in array.reshape(-1)]
    return axes is not None and [a % rank for a in axes] == [rank - 1]


def is_per_channel(value: ir.Value, norm: ir.Value, size: int) -> bool:
    """True for a float constant [D] or [1, …, D] that does not raise the rank of the norm."""
    array, dims = constant(value), sizes(norm)
    if array is None or dims is None or array.dtype != np.float32:
        return False
    return array.size == size and array.shape[-1:] == (size,) and array.ndim <= len(dims)


def _flat(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The per-channel constant with one axis: itself, or a new one of that shape."""
    array = constant(value)
    if array is None or array.ndim == 1:
        return value
    return new_constant(graph, f"{value.name}_flat", array.reshape(-1))


def _attributes(norm: ir.Value) -> dict[str, ir.Attr]:
    node = norm.producer()
    return {} if node is None else dict(node.attributes)


_fuse_affine = fuse_with(LayerNormAffine)
_fuse_negated = fuse_with(LayerNormNegated)
_fuse_core = fuse_with(LayerNormDiv, LayerNormMul)
_fuse_gamma = fuse_with(Gamma)
_fuse_beta = fuse_with(Beta)


def _pools_as_means(graph: ir.Graph) -> None:
    """GlobalAveragePool of [N, T, C] is a mean over the last axis; tf2onnx writes it so."""
    for node in list(graph):
        x = node.inputs[0] if node.op_type == "GlobalAveragePool" else None
        dims = sizes(x)
        if x is None or dims is None or len(dims) != 3 or node.outputs[0].is_graph_output():
            continue
        old = node.outputs[0]
        axes = new_constant(graph, f"{old.name}_axes", np.array([-1], np.int64))
        mean = ir.node("ReduceMean", [x, axes], {"keepdims": 1}, name=node.name)
        new = mean.outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        mean.metadata_props.update(node.metadata_props)
        graph.insert_before(node, mean)
        old.replace_all_uses_with(new)
        graph.remove(node, safe=True)


def fuse_layer_norm(model: ir.Model) -> int:
    """Fuse all decomposed layer norms; returns how many."""
    _pools_as_means(model.graph)
    offsets = (n for n in model.graph if n.op_type == "Sub" and constant(n.inputs[0]) is not None)
    count = _fuse_affine(model) if any(offsets) else 0  # 60 orders of operands: not for nothing
    if any(n.op_type == "Neg" for n in model.graph):
        count += _fuse_negated(model)
    count += _fuse_core(model)
    _fuse_gamma(model)
    _fuse_beta(model)
    return count
