"""Ranges found at run time: of a whole tensor, or of every vector that a product sums over.

A vector has a step of its own: a massive token, or channel of v, harms only itself, and an image is
quantized as it would be alone. What a product sums over is the last axis of its first factor and
the last but one of its second, so that the steps are multiplied back behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ptq_onnx.numerics.around.around import Around, ClipOf, Relative, Restore
from ptq_onnx.numerics.builder import Builder, V
from ptq_onnx.numerics.codes.code import Array, Numbers

LEVELS = np.float32(255)
LEAST = np.float32(1e-30)
"""The largest magnitude of a vector of zeros."""
RESCALED = "vector_rescaled"


@dataclass(frozen=True)
class RunTimeRange(Around):
    """x = (c - z) · s, s and z from the smallest and the largest value of the whole tensor, images
    of a batch together: DynamicQuantizeLinear. What is held is c / 255, whose codes have the step
    1 / 255."""

    name: ClassVar[str] = "dynamic"
    per_row: ClassVar[bool] = False
    clip_of: ClassVar[ClipOf] = "row"

    def relative(self, x: Array, scale: Array) -> Relative:
        """As the standard says: s = (max - min) / 255 with zero among them, z = round(-min / s)."""
        low, high = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
        step = np.asarray((high - low) / LEVELS, np.float32)
        step = np.where(step > 0, step, np.float32(1))
        zero = np.clip(np.rint(-low / step), 0, 255)
        codes = np.clip(np.rint(x / step) + zero, 0, 255)
        return Relative(np.asarray(codes / LEVELS, np.float32), LEVELS * step, -zero * step)

    def emit_codes(self, builder: Builder[V], value: V) -> V:
        """DynamicQuantizeLinear and DequantizeLinear, which ONNX Runtime 1.31 makes a
        DynamicQuantizeMatMul of (measured)."""
        codes, scale, zero = builder.quantize_dynamically(value)
        return builder.op("DequantizeLinear", [codes, scale, zero], "dequantized")


@dataclass(frozen=True)
class TokenMaximum(Around):
    """x = (x / m) · m, m the largest magnitude of each row of a product's first factor."""

    name: ClassVar[str] = "token"
    clip_of: ClassVar[ClipOf] = "row"
    axis: ClassVar[int] = -1
    index: ClassVar[int] = 0

    def relative(self, x: Array, scale: Array) -> Relative:
        """Vectors over their largest magnitude; those of zeros stay."""
        top = np.maximum(np.abs(x).max(axis=self.axis, keepdims=True), LEAST)
        return Relative(np.asarray(x * (np.float32(1) / top), np.float32), factor=top)

    def before(self, builder: Builder[V], value: V, numbers: Numbers) -> tuple[V, Restore[V]]:
        """Divide by the largest magnitude, and give the Mul that restores it behind the
        product."""
        axes = builder.constant("vector", np.array([self.axis], np.int64))
        least = builder.constant("vector_least", LEAST)
        ends = self.top(builder, value, axes, numbers.scale)
        held = builder.op("Max", [*ends, least], "vector_held", single=self.axis)
        inverse = builder.op("Reciprocal", [held], "vector_inverse", single=self.axis)
        part = builder.op("Mul", [value, inverse], "vector_scaled")
        return part, Restore("Mul", held, RESCALED, self.index)

    def top(self, builder: Builder[V], value: V, axes: V, scale: Array) -> tuple[V, ...]:
        """What the largest of is the magnitude that vectors are divided by."""
        size = builder.op("Abs", [value], "magnitude")
        return (builder.op("ReduceMax", [size, axes], "vector_max", single=self.axis),)


@dataclass(frozen=True)
class SkewedToken(TokenMaximum):
    """The same of rows that reach further up than down, as behind GELU: an eighth of the codes are
    below zero, which stays exact, and m is the largest value, or what the least asks for."""

    name: ClassVar[str] = "token_skewed"

    @staticmethod
    def least(levels: int) -> float:
        """The lower end of what so many codes hold where 1 is the upper one; both are codes."""
        zero = round((levels - 1) / 8)
        return -zero / (levels - 1 - zero)

    def relative(self, x: Array, scale: Array) -> Relative:
        """Vectors over m, up to 1; those of zeros stay."""
        low, high = (end(x, axis=self.axis, keepdims=True) for end in (np.min, np.max))
        top = np.maximum(np.maximum(high, low * -_skew(scale)), LEAST)
        return Relative(np.asarray(x * (np.float32(1) / top), np.float32), factor=top)

    def top(self, builder: Builder[V], value: V, axes: V, scale: Array) -> tuple[V, ...]:
        """The largest value, and the least as many times as there are more codes above zero."""
        by = builder.constant("vector_skew", -_skew(scale))
        least = builder.op("ReduceMin", [value, axes], "vector_min", single=self.axis)
        return (
            builder.op("ReduceMax", [value, axes], "vector_max", single=self.axis),
            builder.op("Mul", [least, by], "vector_min_skewed", single=self.axis),
        )


def _skew(scale: Array) -> np.float32:
    """Codes above zero for one below, by the step of vectors up to 1; 0 without any below."""
    above = round(1 / float(scale))
    below = round(above / 7)
    return np.float32(above / below if below else 0)


@dataclass(frozen=True)
class ColumnMaximum(TokenMaximum):
    """The same of each column of a product's second factor: a token of k, a channel of v."""

    name: ClassVar[str] = "column"
    per_row: ClassVar[bool] = False
    axis: ClassVar[int] = -2
    index: ClassVar[int] = 1
