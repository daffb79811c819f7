"""Log-Int-Softmax codes for attention maps (FQ-ViT, arXiv 2111.13824, section 3.3).

t = round(1 / A), code = floor(log2 t), plus one where t >= 1.5 * 2^floor(log2 t); the
value is 2^-code. The top code of b bits (2^b - 1) stands for zero, so that codes really
fit b bits (the official code maps them to zero outside the b bits).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.numerics.spec import LARGEST_EXPONENT

Array = NDArray[np.float32]

THRESHOLD = 4 / 3 * (1 + 1e-5)
"""floor(log2(t * 4/3)) adds the one at t >= 1.5 * 2^k. The surplus of 1e-5 keeps the tie
on the upper side against rounding of the logarithm; it changes no code while t < 2^16."""


def top_code(bits: int) -> int:
    """The code that stands for zero: 2^bits - 1, at most 126."""
    return min((1 << bits) - 1, LARGEST_EXPONENT)


def log2_codes(attention: Array, bits: int) -> NDArray[np.int32]:
    """Codes in [0, top_code] of attention values in [0, 1] (any shape, same shape back)."""
    with np.errstate(divide="ignore", over="ignore"):
        t = np.rint(np.float32(1) / attention.astype(np.float32))
        code = np.floor(np.log2(t.astype(np.float64) * THRESHOLD))
    return np.asarray(np.clip(code, 0, top_code(bits)), np.int32)


def log2_values(codes: NDArray[np.int32], bits: int) -> Array:
    """2^-code as float32; the top code is zero."""
    return np.where(codes >= top_code(bits), 0.0, np.exp2(-codes.astype(np.float64))).astype(
        np.float32
    )
