"""Arithmetic with a number per channel, before or behind a convolution, goes into its weight.

Behind it: BatchNormalization, and Mul, Div, Add and Sub with constants, as reparameterised networks
and Paddle leave them. Before it: a factor always, for zeros that are padded stay zeros, a shift
where nothing is padded. Where something is padded, f·x + d in front becomes x + d/f, the factor in
the weight. All is computed in float64 and rounded once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.fusion.rule import Context, Op, Result, Rule, Term, fuse_with
from ptq_onnx.graph.formula import constant, new_constant, unique_name

Double = NDArray[np.float64]
OPEN = {"_allow_other_inputs": True, "_allow_other_attributes": True}
"""A convolution with or without a bias, of any attributes."""


class _ConvRule(Rule):
    """What the rules share: the constants of the convolution and of the arithmetic."""

    conv: ir.Node
    weight: Double
    bias: Double | None

    def read(self, conv: ir.Value | ir.Node, result: Result) -> Result:
        """Take weight and bias of the convolution; fails where they are no float constants."""
        node = conv.producer() if isinstance(conv, ir.Value) else conv
        assert node is not None
        weight, has_bias = constant(node.inputs[1]), len(node.inputs) > 2 and node.inputs[2]
        bias = constant(node.inputs[2]) if has_bias else None
        if weight is None or weight.dtype != np.float32 or (has_bias and bias is None):
            return result.fail("Weight and bias of the convolution must be constants.", node)
        self.conv, self.weight = node, np.asarray(weight, np.float64)
        self.bias = None if bias is None else np.asarray(bias, np.float64)
        return result

    def per_channel(self, value: ir.Value, channels: int) -> Double | None:
        """[channels] of a constant with one number, or with one for each channel of an image."""
        array = constant(value)
        rank = self.weight.ndim
        if array is None or array.dtype != np.float32 or array.ndim > rank:
            return None
        shape = (1,) * (rank - array.ndim) + array.shape
        if any(size != 1 for axis, size in enumerate(shape) if axis != 1):
            return None
        if shape[1] not in (1, channels):
            return None
        return np.broadcast_to(array.astype(np.float64).ravel(), (channels,))

    def made(self, op: Op, data: ir.Value, weight: Double, bias: Double | None) -> ir.Value:
        """The convolution with other constants, named after the root."""
        old = self.conv.inputs[1]
        assert old is not None
        name = str(old.name).removesuffix("_scaled").removesuffix("_scaled_bias")
        inputs = [data, new_constant(self.graph, f"{name}_scaled", weight.astype(np.float32))]
        if bias is not None:
            flat = bias.astype(np.float32)
            inputs.append(new_constant(self.graph, f"{name}_scaled_bias", flat))
        return self.named(op.Conv(*inputs, **dict(self.conv.attributes)))


class _Behind(_ConvRule):
    """factor · Conv(x) + shift."""

    factor: Double
    shift: Double

    def numbers(self, c: ir.Value) -> tuple[Double, Double] | None:
        """Factor and shift [N] of the arithmetic; None for another constant."""
        raise NotImplementedError

    def check(self, context: Context, c: ir.Value, conv: ir.Value, **_: object) -> Result:
        """Fails unless the convolution has constants, and c a number for each output channel."""
        result = self.read(conv, self.begin(context))
        if not result:
            return result
        found = self.numbers(c)
        if found is None:
            return result.fail("The constant must have one number per channel.", c)
        self.factor, self.shift = found
        return result

    def rewrite(self, op: Op, x: ir.Value, conv: ir.Value, **_: object) -> ir.Value:
        """The Conv with both in its weight and bias."""
        ones = (1,) * (self.weight.ndim - 1)
        weight = self.weight * self.factor.reshape(-1, *ones)
        bias = np.zeros(len(weight)) if self.bias is None else self.bias
        return self.made(op, x, weight, bias * self.factor + self.shift)


class ConvMul(_Behind):
    """Behind a Conv, a factor."""

    def pattern(self, op: Op, x: Term, w: Term, c: Term) -> Term:
        """Conv(x) · c"""
        return op.Mul(op.Conv(x, w, **OPEN, _outputs=["conv"]), c)

    def numbers(self, c: ir.Value) -> tuple[Double, Double] | None:
        """c and 0."""
        found = self.per_channel(c, len(self.weight))
        return None if found is None else (found, np.zeros(len(found)))


class ConvDiv(_Behind):
    """Behind a Conv, a divisor."""

    def pattern(self, op: Op, x: Term, w: Term, c: Term) -> Term:
        """Conv(x) / c"""
        return op.Div(op.Conv(x, w, **OPEN, _outputs=["conv"]), c)

    def numbers(self, c: ir.Value) -> tuple[Double, Double] | None:
        """1 / c and 0; None where a divisor is 0."""
        found = self.per_channel(c, len(self.weight))
        return None if found is None or not found.all() else (1 / found, np.zeros(len(found)))


class ConvAdd(_Behind):
    """Behind a Conv, a shift."""

    def pattern(self, op: Op, x: Term, w: Term, c: Term) -> Term:
        """Conv(x) + c"""
        return op.Add(op.Conv(x, w, **OPEN, _outputs=["conv"]), c)

    def numbers(self, c: ir.Value) -> tuple[Double, Double] | None:
        """1 and c."""
        found = self.per_channel(c, len(self.weight))
        return None if found is None else (np.ones(len(found)), found)


class ConvSub(_Behind):
    """Behind a Conv, what is subtracted."""

    def pattern(self, op: Op, x: Term, w: Term, c: Term) -> Term:
        """Conv(x) - c"""
        return op.Sub(op.Conv(x, w, **OPEN, _outputs=["conv"]), c)

    def numbers(self, c: ir.Value) -> tuple[Double, Double] | None:
        """1 and -c."""
        found = self.per_channel(c, len(self.weight))
        return None if found is None else (np.ones(len(found)), -found)


class ConvBatchNorm(_ConvRule):
    """Behind a Conv, BatchNormalization."""

    def pattern(self, op: Op, x: Term, w: Term, g: Term, b: Term, m: Term, v: Term) -> Term:
        """BatchNormalization(Conv(x))"""
        conv = op.Conv(x, w, **OPEN, _outputs=["conv"])
        return op.BatchNormalization(conv, g, b, m, v, _allow_other_attributes=True)

    def check(
        self, context: Context, conv: ir.Value, g: ir.Value, b: ir.Value, m: ir.Value, v: ir.Value,
        **_: object,
    ) -> Result:  # fmt: skip
        """Fails unless all are constants and the statistics are those of training."""
        result = self.read(conv, self.begin(context))
        if not result:
            return result
        arrays = [constant(value) for value in (g, b, m, v)]
        if any(a is None or a.shape != (len(self.weight),) for a in arrays):
            return result.fail("Scale, bias, mean and variance must be constants [C].", g)
        if self.root.attributes.get_int("training_mode", 0):
            return result.fail("training_mode must be 0.", self.root)
        gamma, beta, mean, variance = (np.asarray(a, np.float64) for a in arrays)
        epsilon = self.root.attributes.get_float("epsilon", 1e-5)
        self.factor = gamma / np.sqrt(variance + epsilon)
        self.shift = beta - mean * self.factor
        return result

    rewrite = _Behind.rewrite


class _Before(_ConvRule):
    """Arithmetic in front of a Conv."""

    def inside(self, context: Context, x: ir.Value) -> Result:
        """Fails where x is the graph's input."""
        result = self.read(context.root, self.begin(context))
        if result and x.producer() is None:
            return result.fail("The normalisation of the image is read from its arithmetic.", x)
        return result

    def input_channels(self, result: Result, c: ir.Value) -> Result:
        """Fails unless c has a number for each input channel."""
        if not result:
            return result
        found = self.per_channel(c, inputs_of(self.conv, self.weight))
        if found is None:
            return result.fail("The constant must have one number per channel.", c)
        self.rows = found
        return result


class MulConv(_Before):
    """Before a Conv, a factor."""

    def pattern(self, op: Op, x: Term, w: Term, c: Term) -> Term:
        """Conv(x · c)"""
        return op.Conv(op.Mul(x, c), w, **OPEN)

    def check(self, context: Context, x: ir.Value, c: ir.Value, **_: object) -> Result:
        """Fails unless c has a number for each input channel and x is not the graph's input."""
        return self.input_channels(self.inside(context, x), c)

    def rewrite(self, op: Op, x: ir.Value, **_: object) -> ir.Value:
        """The Conv with the factor in its weight."""
        return self.made(op, x, self.weight * spread(self.conv, self.weight, self.rows), self.bias)


class AddConv(_Before):
    """Before a Conv that pads nothing, a shift."""

    def pattern(self, op: Op, x: Term, w: Term, c: Term) -> Term:
        """Conv(x + c)"""
        return op.Conv(op.Add(x, c), w, **OPEN)

    def check(self, context: Context, x: ir.Value, c: ir.Value, **_: object) -> Result:
        """Fails unless c has a number for each input channel, and nothing is padded."""
        result = self.inside(context, x)
        if not result:
            return result
        get = self.conv.attributes
        auto = get.get_string("auto_pad", "NOTSET")
        if auto not in ("NOTSET", "VALID") or (auto == "NOTSET" and any(get.get_ints("pads", ()))):
            return result.fail("Padded zeros have no shift.", self.conv)
        return self.input_channels(result, c)

    def rewrite(self, op: Op, x: ir.Value, **_: object) -> ir.Value:
        """The Conv with the shift in its bias."""
        added = self.weight * spread(self.conv, self.weight, self.rows)
        shift = added.reshape(len(added), -1).sum(axis=1)
        return self.made(op, x, self.weight, shift if self.bias is None else self.bias + shift)


class AffineConv(_Before):
    """Before a Conv that pads, a factor and a shift: the factor goes, the shift is divided."""

    def pattern(self, op: Op, x: Term, w: Term, f: Term, d: Term) -> Term:
        """Conv(x · f + d)"""
        return op.Conv(op.Add(op.Mul(x, f), d), w, **OPEN)

    def check(self, context: Context, x: ir.Value, f: ir.Value, d: ir.Value, **_: object) -> Result:
        """Fails unless both have a number for each input channel, the factor none that is 0."""
        result = self.inside(context, x)
        if not result:
            return result
        channels = inputs_of(self.conv, self.weight)
        factor, shift = self.per_channel(f, channels), self.per_channel(d, channels)
        if factor is None or shift is None or not factor.all():
            return result.fail("Factor and shift must have one number per channel.", f)
        self.rows, self.shift = factor, shift / factor
        self.single = all(constant(v).size == 1 for v in (f, d))  # type: ignore[union-attr]
        return result

    def rewrite(self, op: Op, x: ir.Value, d: ir.Value, **_: object) -> ir.Value:
        """Conv(x + d/f), f in the weight."""
        shift = (
            self.shift[0] if self.single else self.shift.reshape(-1, *[1] * (self.weight.ndim - 2))
        )
        divided = new_constant(self.graph, f"{d.name}_divided", np.asarray(shift, np.float32))
        moved = op.Add(x, divided)
        moved.name, moved.shape, moved.type = (
            unique_name(self.graph, f"{x.name}_shifted"),
            x.shape,
            x.type,
        )
        moved.producer().name = f"{moved.name}_node"
        return self.made(
            op, moved, self.weight * spread(self.conv, self.weight, self.rows), self.bias
        )


def inputs_of(conv: ir.Node, weight: NDArray[np.generic]) -> int:
    """Input channels of a convolution."""
    return int(weight.shape[1]) * conv.attributes.get_int("group", 1)


def spread(conv: ir.Node, weight: Double, rows: Double) -> Double:
    """A number per input channel [C] as it multiplies the weight [N, C/groups, …]."""
    outputs, inside = weight.shape[:2]
    group = np.arange(outputs) // (outputs // conv.attributes.get_int("group", 1))
    index = group[:, None] * inside + np.arange(inside)
    return np.asarray(rows[index].reshape(outputs, inside, *[1] * (weight.ndim - 2)))


RULES: tuple[type[Rule], ...] = (
    ConvBatchNorm, ConvMul, ConvDiv, ConvAdd, ConvSub, AddConv, MulConv, AffineConv,
)  # fmt: skip
_once = fuse_with(*RULES)
ROUNDS = 16


def fuse_conv_affine(model: ir.Model) -> int:
    """Fold all that can be, one behind the other; returns how many."""
    total = 0
    for _ in range(ROUNDS):
        count = _once(model)
        total += count
        if not count:
            break
    return total
