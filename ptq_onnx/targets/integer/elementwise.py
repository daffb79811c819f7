"""Sums and scalings of the residual stream, pooling, and tables for activations.

Residual stream: PTF codes are brought to the common grid of their tensor by shifts, X =
(x_q - z) ≪ α; the branch comes as the 32-bit accumulator of proj or fc2, and is not rounded
before the sum. Both are added in one fixed-point requantization, whose shift holds the
output's own exponent: y = clip(⌊(X M_1 + acc M_2,c + C_c) / 2^(n_c)⌋).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.targets.integer.builder import I32, I64, TYPES, Builder, type_of_codes
from ptq_onnx.targets.integer.fixed_point import FixedPoint
from ptq_onnx.targets.integer.grid import Double, Grid, Ints


@dataclass(frozen=True, eq=False)
class Term:
    """One addend: codes that are widened, an accumulator as it is, or a constant's codes."""

    zero: Ints
    alpha: Ints
    widen: bool
    constant: Ints | None = None
    """Codes as uint8; None for an input."""

    def __call__(self, x: Ints) -> Ints:
        """(x − z) ≪ α, or the accumulator as it is."""
        return (x - self.zero) << self.alpha if self.widen else x

    def emit(self, b: Builder, x: ir.Value) -> ir.Value:
        """The same in ONNX; int64 where codes are widened."""
        return b.wide(x, self.zero, self.alpha) if self.widen else x


@dataclass(frozen=True, eq=False)
class SumStep:
    """Any number of terms, scaled, added and requantized once: Add, and Mul by a constant."""

    terms: tuple[Term, ...]
    finish: FixedPoint

    def __call__(self, *inputs: Ints) -> Ints:
        """Codes of the sum; one input for each term that is not constant, in their order."""
        given = iter(inputs)
        terms = [t(t.constant if t.constant is not None else next(given)) for t in self.terms]
        return self.finish(*terms)

    def emit(self, b: Builder, *inputs_and_name: Any) -> ir.Value:
        """The same in ONNX; the last argument is the output's name."""
        *inputs, name = inputs_and_name
        given = iter(inputs)
        values = []
        for term in self.terms:
            if term.constant is None:
                values.append(term.emit(b, next(given)))
            else:
                codes = b.constant(term.constant.astype(np.uint8), f"{name}_constant")
                values.append(term.emit(b, codes))
        return self.finish.emit(b, *values, name=name)


class SameStep:
    """Codes that stay as they are, with another scale: Mul by a number, whose output is rounded
    later on."""

    def __call__(self, x: Ints) -> Ints:
        """The codes."""
        return x

    def emit(self, b: Builder, x: ir.Value, name: str) -> ir.Value:
        """No node."""
        return x


@dataclass(frozen=True, eq=False)
class MaskStep:
    """Logits' codes, -1 in place of those that are shut out: code · open + open - 1."""

    open: Ints | None
    """1, and 0 where logits are shut out; broadcasts against them. None: the second input is it."""

    def __call__(self, x: Ints, given: Ints | None = None) -> Ints:
        """Codes, or -1."""
        return np.where((self.open if given is None else given) == 1, x, -1)

    def emit(self, b: Builder, *inputs_and_name: Any) -> ir.Value:
        """The same in ONNX; int32."""
        x, *given, name = inputs_and_name
        open_ = given[0] if given else b.number(self.open, I32)
        less = b.op("Sub", [open_, b.number(1, I32)], I32) if given else None
        if less is None:
            assert self.open is not None
            less = b.number(self.open - 1, I32)
        kept = b.op("Mul", [b.cast(x, I32), open_], I32)
        return b.op("Add", [kept, less], I32, name=name)


@dataclass(frozen=True, eq=False)
class GateStep:
    """The product of two activations, element by element, requantized once."""

    terms: tuple[Term, Term]
    finish: FixedPoint

    def __call__(self, x: Ints, y: Ints) -> Ints:
        """Codes of the product."""
        return self.finish(self.terms[0](x) * self.terms[1](y))

    def emit(self, b: Builder, x: ir.Value, y: ir.Value, name: str) -> ir.Value:
        """The same in ONNX, the product in int64."""
        product = b.op("Mul", [self.terms[0].emit(b, x), self.terms[1].emit(b, y)], I64)
        return self.finish.emit(b, product, name=name)


@dataclass(frozen=True, eq=False)
class MeanStep:
    """The mean over axes (pooling): an integer sum, 1/count in the multiplier."""

    term: Term
    axes: tuple[int, ...]
    keepdims: bool
    finish: FixedPoint

    def __call__(self, x: Ints) -> Ints:
        """Codes of the mean over ``axes``: the sum, its division in the multiplier."""
        return self.finish(self.term(x).sum(axis=self.axes, keepdims=self.keepdims))

    def emit(self, b: Builder, x: ir.Value, name: str) -> ir.Value:
        """The same in ONNX; uint8 codes."""
        keep = int(self.keepdims)
        total = b.reduce("ReduceSum", self.term.emit(b, x), *self.axes, keepdims=keep)
        return self.finish.emit(b, total, name=name)


def erf(x: Double) -> Double:
    """The error function, element by element."""
    return np.asarray([math.erf(v) for v in x.ravel()], np.float64).reshape(x.shape)


def sigmoid(x: Double) -> Double:
    """1 / (1 + e^-x)."""
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -700, 700))))


def gelu(x: Double, approximate: str) -> Double:
    """x Φ(x), or its tanh form."""
    if approximate == "tanh":
        return np.asarray(x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    return x / 2 * (1 + erf(x / math.sqrt(2)))


FUNCTIONS: dict[str, Callable[[Double, Any], Double]] = {
    "Gelu": lambda x, node: gelu(x, node.attributes.get_string("approximate", "none")),
    "QuickGelu": lambda x, _: x * sigmoid(1.702 * x),
    "Silu": lambda x, _: x * sigmoid(x),
    "Relu": lambda x, _: np.maximum(x, 0),
    "Sigmoid": lambda x, _: sigmoid(x),
    "Tanh": lambda x, _: np.tanh(x),
    "Erf": lambda x, _: erf(x),
    "HardSwish": lambda x, _: x * np.clip(x / 6 + 0.5, 0, 1),
    "Mish": lambda x, _: x * np.tanh(np.log1p(np.exp(np.minimum(x, 700)))),
}
"""Activations, in float64, of which a table is made."""


@dataclass(frozen=True, eq=False)
class TableStep:
    """y_q = table[pair_c, x_q]: one table of 256 entries per distinct pair of input and output
    factor, exact to the quantized input."""

    tables: NDArray[np.uint8] | NDArray[np.uint16]
    """[pairs, 256]"""
    pair: Ints
    """Pair of every channel, [C]; [] where there is one pair."""

    def __call__(self, x: Ints) -> Ints:
        """The code that the table of its channel holds for each code."""
        return np.asarray(self.tables[self.pair, x], np.int64)

    def emit(self, b: Builder, x: ir.Value, name: str) -> ir.Value:
        """The same in ONNX, one Gather from all tables; uint8 codes."""
        index = b.cast(x, I32)
        if self.pair.ndim:
            index = b.op("Add", [index, b.number(self.pair * 256, I32)], I32)
        table, table_type = b.constant(self.tables.ravel(), f"{name}_table"), self.tables.dtype
        return b.op("Gather", [table, index], ir.DataType.from_numpy(table_type), name=name)


def table_step(node: ir.Node, read: Grid, made: Grid) -> TableStep:
    """The tables of an activation between two grids."""
    function = FUNCTIONS[node.op_type]
    shape = np.broadcast_shapes(read.scale.shape, made.scale.shape)
    scales = np.stack(
        [np.broadcast_to(read.scale, shape).ravel(), np.broadcast_to(made.scale, shape).ravel()],
        axis=1,
    )
    pairs, index = np.unique(scales, axis=0, return_inverse=True)
    codes = np.arange(256)
    x = (np.clip(codes, read.low, read.high) - read.zero) * pairs[:, :1]
    y = np.rint(function(x, node) / pairs[:, 1:]) + made.zero
    tables = np.clip(y, made.low, made.high).astype(TYPES[type_of_codes(made.high)])
    several = len(pairs) > 1
    pair = np.asarray(index, np.int64).reshape(shape) if several else np.zeros((), np.int64)
    return TableStep(tables, pair)
