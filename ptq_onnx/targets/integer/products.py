"""Linears, convolutions and the product QKᵀ: 8-bit codes to 32-bit sums.

acc = Σ (x_q - z_x) w_q fits int32 with room: at most 255 · 128 · K, K < 2^16. Weights are
stored as uint8 with zero point 128, the same int8 numbers 128 higher: ONNX Runtime's uint8 ×
int8 kernel saturates in 16 bits on x86 CPUs without VNNI, its uint8 × uint8 kernel nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.targets.integer.builder import I32, U8, Builder
from ptq_onnx.targets.integer.fixed_point import FixedPoint
from ptq_onnx.targets.integer.grid import Double, Ints

WEIGHT_ZERO = 128


@dataclass(frozen=True, eq=False)
class LinearStep:
    """x W, then the requantization; without one the output is the accumulator."""

    weight: Ints
    """[K, N] int8 codes."""
    zero: int
    finish: FixedPoint | None

    def __call__(self, x: Ints) -> Ints:
        """(x − z) · W of codes [..., K] and a weight [K, N]: codes, or the accumulator without
        ``finish``."""
        return done(matmul(x - self.zero, self.weight), self.finish)

    def emit(self, b: Builder, x: ir.Value, name: str) -> ir.Value:
        """MatMulInteger, and what finishes it."""
        inputs = [x, stored(b, self.weight, name), b.number(self.zero, U8)]
        inputs.append(b.number(WEIGHT_ZERO, U8))
        return finished(b, "MatMulInteger", inputs, {}, self.finish, name)


@dataclass(frozen=True, eq=False)
class ConvStep:
    """A convolution without padding whose patches do not overlap: the patch embedding."""

    weight: Ints
    """[N, C, h, w] int8 codes."""
    zero: int
    finish: FixedPoint | None

    def __call__(self, x: Ints) -> Ints:
        """A convolution whose windows do not overlap, of codes [B, C, H, W]: codes, or the
        accumulator without ``finish``."""
        n, channels, height, width = self.weight.shape
        batch, _, rows, columns = x.shape
        rows, columns = rows // height, columns // width
        cut = x[:, :, : rows * height, : columns * width] - self.zero
        parts = cut.reshape(batch, channels, rows, height, columns, width)
        patches = parts.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows, columns, -1)
        out = matmul(patches, self.weight.reshape(n, -1).T)
        return done(out.transpose(0, 3, 1, 2), self.finish)

    def emit(self, b: Builder, x: ir.Value, name: str) -> ir.Value:
        """ConvInteger, and what finishes it."""
        inputs = [x, stored(b, self.weight, name), b.number(self.zero, U8)]
        inputs.append(b.number(WEIGHT_ZERO, U8))
        kernel = list(self.weight.shape[2:])
        attributes = {"strides": kernel, "kernel_shape": kernel}
        return finished(b, "ConvInteger", inputs, attributes, self.finish, name)


@dataclass(frozen=True, eq=False)
class ProductStep:
    """The product of two activations, (x_q - z_x)(y_q - z_y)."""

    zeros: tuple[int, int]
    finish: FixedPoint | None

    def __call__(self, x: Ints, y: Ints) -> Ints:
        """(x − z_x) · (y − z_y) of codes [..., M, K] and [..., K, N]: codes, or the accumulator."""
        return done(matmul(x - self.zeros[0], y - self.zeros[1]), self.finish)

    def emit(self, b: Builder, x: ir.Value, y: ir.Value, name: str) -> ir.Value:
        """MatMulInteger of two activations, and what finishes it."""
        inputs = [x, y, *(b.number(zero, U8) for zero in self.zeros)]
        return finished(b, "MatMulInteger", inputs, {}, self.finish, name)


def matmul(x: Ints, y: Ints) -> Ints:
    """The exact product: float64 holds every sum below 2^53, and is much faster."""
    return np.asarray(x.astype(np.float64) @ y.astype(np.float64), np.int64)


def done(acc: Ints, finish: FixedPoint | None) -> Ints:
    """The accumulator, requantized where there is a ``finish``."""
    return acc if finish is None else finish(acc)


def stored(b: Builder, weight: Ints, name: str) -> ir.Value:
    """The weight's codes as uint8, 128 higher."""
    return b.constant((weight + WEIGHT_ZERO).astype(np.uint8), f"{name}_weight")


def finished(
    b: Builder,
    op_type: str,
    inputs: list[ir.Value],
    attributes: dict[str, Any],
    finish: FixedPoint | None,
    name: str,
) -> ir.Value:
    """The product, and its requantization if there is one."""
    if finish is None:
        return b.op(op_type, inputs, I32, attributes, name=name)
    return finish.emit(b, b.op(op_type, inputs, I32, attributes), name=name)


def largest_sum(weight: Ints, zero: int, limits: tuple[int, int], axis: int) -> int:
    """max |Σ (x - z) w| over all x within the limits, ``axis`` being that of the outputs."""
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    low, high = limits[0] - zero, limits[1] - zero
    top = np.maximum(rows * low, rows * high).sum(axis=1)
    bottom = np.minimum(rows * low, rows * high).sum(axis=1)
    return int(max(abs(int(top.max(initial=0))), abs(int(bottom.min(initial=0)))))


def scale_of(x_step: float, weight_scale: NDArray[np.float32]) -> Double:
    """Real value of one accumulator step, per output."""
    return np.asarray(x_step * weight_scale.astype(np.float64), np.float64)
