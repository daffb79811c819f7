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
    """A convolution over two axes; ConvInteger fills up with the code of zero."""

    weight: Ints
    """[N, C / group, h, w] int8 codes."""
    zero: int
    finish: FixedPoint | None
    strides: tuple[int, ...] = (1, 1)
    pads: tuple[int, ...] = (0, 0, 0, 0)
    dilations: tuple[int, ...] = (1, 1)
    group: int = 1

    def __call__(self, x: Ints) -> Ints:
        """The sums of codes [B, C, H, W] less their zero: codes, or the accumulator without
        ``finish``."""
        n, depth, height, width = self.weight.shape
        top, left, bottom, right = self.pads
        filled = np.pad(x - self.zero, ((0, 0), (0, 0), (top, bottom), (left, right)))
        down, across = self.dilations
        reach = (height - 1) * down + 1, (width - 1) * across + 1
        windows = np.lib.stride_tricks.sliding_window_view(filled, reach, axis=(2, 3))
        windows = windows[:, :, :: self.strides[0], :: self.strides[1], ::down, ::across]
        batch, _, rows, columns = windows.shape[:4]
        parts = windows.reshape(batch, self.group, depth, rows * columns, height * width)
        patches = parts.transpose(0, 1, 3, 2, 4).reshape(batch, self.group, rows * columns, -1)
        weight = self.weight.reshape(self.group, n // self.group, -1).transpose(0, 2, 1)
        out = matmul(patches, weight).transpose(0, 1, 3, 2)
        return done(out.reshape(batch, n, rows, columns), self.finish)

    def emit(self, b: Builder, x: ir.Value, name: str) -> ir.Value:
        """ConvInteger, and what finishes it."""
        inputs = [x, stored(b, self.weight, name), b.number(self.zero, U8)]
        inputs.append(b.number(WEIGHT_ZERO, U8))
        attributes: dict[str, Any] = {
            "strides": list(self.strides),
            "kernel_shape": list(self.weight.shape[2:]),
        }
        if any(self.pads):
            attributes["pads"] = list(self.pads)
        if self.dilations != (1, 1):
            attributes["dilations"] = list(self.dilations)
        if self.group > 1:
            attributes["group"] = self.group
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


def largest_sum(
    weight: Ints, zero: int, limits: tuple[int, int], axis: int, *, filled: bool = False
) -> int:
    """max |Σ (x - z) w| over all x within the limits, ``axis`` being that of the outputs.
    ``filled``: x = z may stand for any, as where a convolution fills up."""
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    low, high = limits[0] - zero, limits[1] - zero
    if filled:
        low, high = min(low, 0), max(high, 0)
    top = np.maximum(rows * low, rows * high).sum(axis=1)
    bottom = np.minimum(rows * low, rows * high).sum(axis=1)
    return int(max(abs(int(top.max(initial=0))), abs(int(bottom.min(initial=0)))))


def scale_of(x_step: float, weight_scale: NDArray[np.float32]) -> Double:
    """Real value of one accumulator step, per output."""
    return np.asarray(x_step * weight_scale.astype(np.float64), np.float64)
