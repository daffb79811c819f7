"""FP8 E4M3 as pure functions on arrays: one sign bit, four of exponent (bias 7), three of mantissa.

value = (-1)^s · 2^(e-7) · (1 + m/8), for e = 0: (-1)^s · 2^-6 · m/8; s1111111 is NaN, there is no
infinity, the largest is 448. Rounding is half to even, and saturates. Source: Micikevicius et al.,
"FP8 Formats for Deep Learning" (arXiv 2209.05433), and ONNX's FLOAT8E4M3FN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 448
LEAST_EXPONENT = -6
MANTISSA = 3


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
