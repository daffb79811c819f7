"""FP8 E4M3 as pure functions on arrays: one sign bit, four of exponent (bias 7), three of mantissa.

value = (-1)^s · 2^(e-7) · (1 + m/8), for e = 0: (-1)^s · 2^-6 · m/8; s1111111 is NaN, there is no
infinity, the largest is 448. Rounding is half to even, and saturates. Source: Micikevicius et al.,
"FP8 Formats for Deep Learning" (arXiv 2209.05433), and ONNX's FLOAT8E4M3FN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ptq_onnx.numerics.builder import Builder, V
from ptq_onnx.numerics.codes.code import Array, Code, Codes, Numbers, Solved, Storage
from ptq_onnx.numerics.codes.uniform import quantize_dequantize, symmetric_scale
from ptq_onnx.numerics.weights import weight_scale

LARGEST = 448
LEAST_EXPONENT = -6
MANTISSA = 3
EDGE = 464
"""Half a step beyond the largest."""


def e4m3_codes(x: NDArray[Any]) -> NDArray[np.int32]:
    """The 8 bits (0…255, shape of ``x``) of the nearest values; beyond 448 the largest. No NaN."""
    size = np.minimum(np.abs(np.asarray(x, np.float64)), LARGEST)
    _, exponent = np.frexp(size)  # size = f 2^exponent, f in [1/2, 1)
    power = np.where(size > 0, np.maximum(exponent - 1, LEAST_EXPONENT), LEAST_EXPONENT)
    units = np.rint(np.ldexp(size, MANTISSA - power)).astype(np.int32)
    # units is 8…16 for normal numbers, where 16 carries into the exponent, and 0…8 below.
    bits = units + ((power - LEAST_EXPONENT) << MANTISSA)
    return np.asarray(bits + np.where(np.signbit(x), 128, 0), np.int32)


def e4m3_values(codes: NDArray[Any]) -> NDArray[np.float32]:
    """Float32 values of 8-bit codes."""
    bits = np.asarray(codes, np.int32)
    exponent, mantissa = (bits >> MANTISSA) & 15, bits & 7
    units = np.where(exponent > 0, 8 + mantissa, mantissa)
    power = np.maximum(exponent, 1) - 1 + LEAST_EXPONENT - MANTISSA
    size = np.ldexp(units.astype(np.float32), power)
    size = np.where((bits & 127) == 127, np.float32(np.nan), size)
    return np.asarray(np.where(bits & 128, -size, size), np.float32)


@dataclass(frozen=True)
class E4m3(Code):
    """8-bit floats times a scale. The codes are the bits; zero points are zero."""

    name: ClassVar[str] = "e4m3"
    floating: ClassVar[bool] = True

    def limits(self, bits: int, signed: bool) -> tuple[int, int]:
        """Of the values, in units of the scale."""
        return -LARGEST, LARGEST

    def solve(self, low: Array, high: Array, bits: int, signed: bool, symmetric: bool) -> Solved:
        """The scale that puts the larger end on the largest value, 448; the zero point is 0."""
        scale = symmetric_scale(low, high, self.limits(bits, signed))
        return Solved(scale, np.zeros(scale.shape, np.int32))

    def codes(self, x: Array, numbers: Numbers) -> Codes:
        """The nearest 8-bit float of x / scale, as its bits."""
        return e4m3_codes(x / numbers.scale)

    def values(self, codes: Codes, numbers: Numbers) -> Array:
        """The 8-bit float times the scale, float32."""
        return np.asarray(e4m3_values(codes) * numbers.scale.astype(np.float32), np.float32)

    def reach(self, numbers: Numbers) -> tuple[NDArray[Any], NDArray[Any]]:
        """±448 · scale"""
        return -LARGEST * numbers.scale, LARGEST * numbers.scale

    def clipped(self, x: Array, numbers: Numbers) -> NDArray[np.bool_]:
        """Where |x| would round beyond 448 · scale."""
        return np.asarray(np.abs(x) > EDGE * numbers.scale)

    def emit(self, builder: Builder[V], value: V, numbers: Numbers) -> V:
        """QuantizeLinear to float8e4m3fn, and DequantizeLinear."""
        return quantize_dequantize(builder, value, numbers, self._point(numbers.zero_point))

    def weight_scale(self, weight: Array, axis: int | None, bits: int) -> Array:
        """The largest magnitude, of each slice along ``axis`` or of all, over 448."""
        return weight_scale(weight, axis, bits, LARGEST)

    def stored(self, codes: Codes, storage: Storage, signed: bool) -> NDArray[Any]:
        """The bits as float8_e4m3fn, whatever the storage."""
        return np.asarray(codes).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)

    @staticmethod
    def _point(zero_point: Codes) -> NDArray[Any]:
        return np.zeros(np.shape(zero_point), ml_dtypes.float8_e4m3fn)
