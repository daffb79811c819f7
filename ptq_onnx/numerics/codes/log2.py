"""Log-Int-Softmax codes for attention maps (FQ-ViT, arXiv 2111.13824, section 3.3).

t = round(1 / A), code = floor(log2 t), plus one where t >= 1.5 * 2^floor(log2 t); the
value is 2^-code. The top code of b bits (2^b - 1) stands for zero, so that codes really
fit b bits (the official code maps them to zero outside the b bits).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.numerics.builder import Builder, V
from ptq_onnx.numerics.codes.code import Array, Code, Codes, Levels, Numbers, Solved
from ptq_onnx.numerics.codes.table import look_up

LARGEST_EXPONENT = 126
"""2^-126 is the smallest normal float32: no log2 code means a smaller value."""

THRESHOLD = 4 / 3 * (1 + 1e-5)
"""floor(log2(t * 4/3)) adds the one at t >= 1.5 * 2^k. The surplus of 1e-5 keeps the tie
on the upper side against rounding of the logarithm; it changes no code while t < 2^16."""


def top_code(bits: int) -> int:
    """The code that stands for zero: 2^bits - 1, at most 126."""
    return min((1 << bits) - 1, LARGEST_EXPONENT)


def log2_codes(attention: Array, bits: int) -> Codes:
    """Codes in [0, top_code] of attention values in [0, 1] (any shape, same shape back)."""
    with np.errstate(divide="ignore", over="ignore"):
        t = np.rint(np.float32(1) / attention.astype(np.float32))
        code = np.floor(np.log2(t.astype(np.float64) * THRESHOLD))
    return np.asarray(np.clip(code, 0, top_code(bits)), np.int32)


def log2_values(codes: Codes, bits: int) -> Array:
    """2^-code as float32; the top code is zero."""
    return np.where(codes >= top_code(bits), 0.0, np.exp2(-codes.astype(np.float64))).astype(
        np.float32
    )


@dataclass(frozen=True)
class Log2(Code):
    """Powers of two from 1 down, and zero: of values on [0, 1]. No scale has a say in it."""

    name: ClassVar[str] = "log2"
    fixed: ClassVar[str | None] = "2^−code"
    wider: ClassVar[str] = "--no-lis"
    instead: ClassVar[str] = "fqvit --no-lis or deploy give uniform ones"

    def limits(self, bits: int, signed: bool) -> tuple[int, int]:
        """The last one means zero."""
        return 0, top_code(bits)

    def solve(self, low: Array, high: Array, bits: int, signed: bool, symmetric: bool) -> Solved:
        """Scale 1 and zero point 0: the codes hold shares in [0, 1] and nothing else."""
        return Solved(np.ones(np.shape(low), np.float32), np.zeros(np.shape(low), np.int32))

    def codes(self, x: Array, numbers: Numbers) -> Codes:
        """The nearest power of two by its exponent; the top code is zero."""
        return log2_codes(x, numbers.bits)

    def values(self, codes: Codes, numbers: Numbers) -> Array:
        """2^-code, float32; 0 for the top code."""
        return log2_values(codes, numbers.bits)

    def reach(self, numbers: Numbers) -> tuple[NDArray[Any], NDArray[Any]]:
        """0 and 1, for every scale."""
        shape = np.shape(numbers.scale)
        return np.zeros(shape), np.ones(shape)

    def clipped(self, x: Array, numbers: Numbers) -> NDArray[np.bool_]:
        """Nothing: a share is never beyond 1, and what is too small is zero."""
        return np.zeros(x.shape, np.bool_)

    def recognise(self, levels: Levels) -> bool:
        """A table of at least two different values, all of them zeros and powers of two."""
        some = levels[levels != 0].astype(np.float64)
        mantissas, _ = np.frexp(some)
        return len(np.unique(some)) >= 2 and bool(np.all(mantissas == 0.5))

    def emit(self, builder: Builder[V], value: V, numbers: Numbers) -> V:
        """Codes by division, rounding and logarithm, then their values from a table."""
        top = top_code(numbers.bits)
        one = builder.constant("one", np.float32(1))
        level = builder.op("Div", [one, value], "reciprocal")
        threshold = builder.constant("threshold", np.float32(THRESHOLD))
        to_log2 = builder.constant("log2e", np.float32(1 / math.log(2)))
        zero = builder.constant("zero", np.float32(0))
        last = builder.constant("top", np.float32(top))
        level = builder.op("Round", [level], "rounded")
        level = builder.op("Mul", [level, threshold], "threshold_scaled")
        level = builder.op("Log", [level], "log")
        level = builder.op("Mul", [level, to_log2], "log2")
        level = builder.op("Floor", [level], "floor")
        level = builder.op("Clip", [level, zero, last], "level")
        table = log2_values(np.arange(top + 1, dtype=np.int32), numbers.bits)
        return look_up(builder, level, table)
