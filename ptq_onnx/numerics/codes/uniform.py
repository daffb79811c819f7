"""Uniform quantization as pure functions on arrays.

Symmetric:  x_q = clip(round(x / s), -2^(b-1), 2^(b-1) - 1)
Asymmetric: x_q = clip(round(x / s) + z, 0, 2^b - 1)

Rounding is half to even, as ONNX's QuantizeLinear. Source: FQ-ViT, arXiv 2111.13824,
section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ptq_onnx.config.bits import WIDEST
from ptq_onnx.numerics.builder import Builder, V
from ptq_onnx.numerics.codes.code import TINY, Array, Code, Codes, Numbers, Solved, Storage
from ptq_onnx.numerics.weights import weight_scale

HIGHER = {"uint8": 128, "uint16": 32768}
"""Signed codes that are stored in uint8 are stored this much higher, zero point included: the same
numbers, in the type that ONNX Runtime's x86 kernels want. It would convert int8 by itself, but
then rejects its own graph from opset 21 on (measured with 1.31: the QuantizeLinear that it
moves over a Transpose keeps output_dtype INT8)."""
TYPES = {
    "uint8": np.uint8,
    "int8": np.int8,
    "uint4": ml_dtypes.uint4,
    "uint16": np.uint16,
    "int16": np.int16,
}


@dataclass(frozen=True)
class Uniform(Code):
    """value = (code - zero point) · scale."""

    name: ClassVar[str] = "uniform"
    widest: ClassVar[int] = WIDEST

    def limits(self, bits: int, signed: bool) -> tuple[int, int]:
        """Signed −2^(b−1) … 2^(b−1) − 1, unsigned 0 … 2^b − 1."""
        if signed:
            return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        return 0, (1 << bits) - 1

    def solve(self, low: Array, high: Array, bits: int, signed: bool, symmetric: bool) -> Solved:
        """Symmetric: the scale that covers the larger end, zero point 0; else scale and zero point
        that cover both."""
        limits = self.limits(bits, signed)
        if symmetric:
            scale = symmetric_scale(low, high, limits)
            return Solved(scale, np.zeros(scale.shape, np.int32))
        return Solved(*asymmetric_scale(low, high, limits))

    def codes(self, x: Array, numbers: Numbers) -> Codes:
        """clip(round(x / scale) + z, low, high), rounded half to even."""
        low, high = self.limits(numbers.bits, numbers.signed)
        codes = np.rint(x / numbers.scale) + numbers.zero_point
        return np.asarray(np.clip(codes, low, high), np.int32)

    def values(self, codes: Codes, numbers: Numbers) -> Array:
        """(code − z) · scale, float32."""
        units = (codes - numbers.zero_point).astype(np.float32)
        return np.asarray(units * numbers.scale.astype(np.float32), np.float32)

    def reach(self, numbers: Numbers) -> tuple[NDArray[Any], NDArray[Any]]:
        """(low − z) · scale and (high − z) · scale."""
        low, high = self.limits(numbers.bits, numbers.signed)
        zero = numbers.zero_point
        return (low - zero) * numbers.scale, (high - zero) * numbers.scale

    def clipped(self, x: Array, numbers: Numbers) -> NDArray[np.bool_]:
        """What lies more than half a step beyond the smallest or the largest value."""
        zero, step = numbers.zero_point.astype(np.float32), numbers.scale
        low, high = (edge - zero for edge in self.limits(numbers.bits, numbers.signed))
        return np.asarray((x < (low - 0.5) * step) | (x > (high + 0.5) * step))

    def emit(self, builder: Builder[V], value: V, numbers: Numbers) -> V:
        """A Clip to the codes' range where they have less bits than their type; Q, DQ."""
        if numbers.bits < 8 * np.dtype(TYPES[numbers.stored]).itemsize:
            zero, step = int(numbers.zero_point), float(numbers.scale)
            edges = self.limits(numbers.bits, numbers.signed)
            ends = [builder.constant("clip", np.float32((edge - zero) * step)) for edge in edges]
            value = builder.op("Clip", [value, *ends], "clipped")
        point = self.stored(numbers.zero_point, numbers.stored, numbers.signed)
        return quantize_dequantize(builder, value, numbers, point)

    def misfit(self, numbers: Numbers) -> str | None:
        """A zero point that is no code, and not the 0 that weights have."""
        low, high = self.limits(numbers.bits, numbers.signed)
        least = min(low, 0)
        if (numbers.zero_point < least).any() or (numbers.zero_point > high).any():
            return f"a zero point is not from {least} to {high}"
        return None

    def weight_scale(self, weight: Array, axis: int | None, bits: int) -> Array:
        """The symmetric scale, of each slice along ``axis`` or of all, that covers the largest
        magnitude."""
        return weight_scale(weight, axis, bits)

    def stored(self, codes: Codes, storage: Storage, signed: bool) -> NDArray[Any]:
        """In the storage's type; signed codes stored without a sign lie half their range higher."""
        higher = HIGHER.get(storage, 0) if signed else 0
        return np.asarray(codes + higher).astype(TYPES[storage])


def quantize_dequantize(
    builder: Builder[V], value: V, numbers: Numbers, zero_point: NDArray[Any]
) -> V:
    """QuantizeLinear and DequantizeLinear; the type of the zero point is that of the codes."""
    scale = builder.constant("scale", np.asarray(numbers.scale, np.float32))
    zero = builder.constant("zero_point", zero_point)
    codes = builder.op("QuantizeLinear", [value, scale, zero], "quantized", dtype=zero_point.dtype)
    return builder.op("DequantizeLinear", [codes, scale, zero], "dequantized")


def symmetric_scale(low: Array, high: Array, limits: tuple[int, int]) -> Array:
    """Scale that covers [low, high] with zero point 0 (any shape; the same shape back).

    The larger side decides: s = max(|low| / |q_min|, high / q_max), at least ``TINY``.
    """
    smallest, largest = limits
    scale = np.maximum(np.maximum(-low, 0) / max(-smallest, 1), np.maximum(high, 0) / largest)
    if smallest == 0:
        scale = np.maximum(high, 0) / largest
    return np.maximum(scale, TINY).astype(np.float32)


def asymmetric_scale(
    low: Array, high: Array, limits: tuple[int, int]
) -> tuple[Array, NDArray[np.int32]]:
    """Scale and zero point that cover [low, high], zero being exact (any shape).

    s = (high - low) / (q_max - q_min), z = round(q_min - low / s), with the range widened
    to hold zero.
    """
    smallest, largest = limits
    # In float64: the width of a range may be beyond float32.
    low, high = np.minimum(low, np.float64(0)), np.maximum(high, np.float64(0))
    scale = np.maximum((high - low) / (largest - smallest), TINY).astype(np.float32)
    zero = np.clip(np.rint(smallest - low / scale), smallest, largest).astype(np.int32)
    return scale, zero
