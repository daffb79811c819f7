"""GELU by I-BERT's polynomial of the error function (arXiv 2101.01321, algorithm 1).

    erf(v) ≈ sgn(v) (1 - a (b - min(|v|, b))²),  gelu(x) = x/2 · (1 + erf(x/√2))

with a = 0.2888 and b = 1.769. All channels share the grid u = 2^-10 of |v| = |x|/√2, whatever
the scale s_c of theirs, so that the polynomial's constants B = round(b/u) = 1811 and C =
round(1/(a u²)) = 3,630,803 serve them all:

    d = code - z,  p = min((|d| m_c + 2^11) ≫ 12, B),  m_c = round(s_c 2^12 / (√2 u))
    e = C - (B - p)²          C times erf, with half a unit of u in p and in B
    y = requantize(d (C ± e)), with the sign of d; the step of d (C ± e) is s_c / 2C

Bounds. m_c is cut to B · 2^12 < 2^23, from where on |d| = 1 is beyond b already, so |d| m_c +
2^11 < 2^31 fits uint32. (B - p)² ≤ B² < C, so e is in (0, C], C ± e in [0, 2C] with 2C < 2^23,
and |d (C ± e)| ≤ 255 · 2C < 2^31 fits int32.

The polynomial is off by up to 0.0182 (at |x| = 2.35); a table (``elementwise``) is exact, but
needs memory to look up. The tanh form of GELU differs from the other by less than 0.0005, and
takes the same polynomial.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ptq_onnx.targets.integer.builder import BOOL, I32, U32, Builder
from ptq_onnx.targets.integer.fixed_point import MULTIPLIER_BITS, FixedPoint, requantize, squeeze
from ptq_onnx.targets.integer.grid import Grid, Ints

ERF_A, ERF_B = 0.2888, 1.769
"""erf(v) ≈ 1 - a (b - v)² for 0 ≤ v ≤ b, 1 beyond."""

UNIT = 2.0**-10
"""u, the step of |x|/√2."""

SHIFT = 12
"""Fraction bits of m_c."""

EDGE = round(ERF_B / UNIT)
"""B."""

ONE = round(1 / (ERF_A * UNIT**2))
"""C, which stands for erf = 1."""


@dataclass(frozen=True, eq=False)
class GeluStep:
    """The constants of one GELU: m_c per channel, or one; zero point; requantization."""

    zero: Ints
    multiplier: Ints
    finish: FixedPoint

    def __call__(self, x: Ints) -> Ints:
        """Codes of GELU: d (1 + erf) in fixed point, erf by the polynomial 1 − (EDGE − p)² in p ∝
        |d|."""
        d = x - self.zero
        p = np.minimum((np.abs(d) * self.multiplier + (1 << (SHIFT - 1))) >> SHIFT, EDGE)
        e = ONE - (EDGE - p) ** 2
        return self.finish(d * np.where(d >= 0, ONE + e, ONE - e))

    def emit(self, b: Builder, x: ir.Value, name: str) -> ir.Value:
        """The same in ONNX, in 32 bits; uint8 codes."""
        d = b.op("Sub", [b.cast(x, I32), b.number(self.zero, I32)], I32)
        magnitude = b.cast(b.op("Abs", [d], I32), U32)
        scaled = b.op("Mul", [magnitude, b.number(self.multiplier, U32)], U32)
        lifted = b.op("Add", [scaled, b.number(1 << (SHIFT - 1), U32)], U32)
        p = b.op("Min", [b.shift(lifted, b.number(SHIFT, U32)), b.number(EDGE, U32)], U32)
        rest = b.op("Sub", [b.number(EDGE, U32), p], U32)
        square = b.op("Mul", [rest, rest], U32)
        e = b.cast(b.op("Sub", [b.number(ONE, U32), square], U32), I32)
        one = b.number(ONE, I32)
        positive = b.op("GreaterOrEqual", [d, b.number(0, I32)], BOOL)
        above, below = b.op("Add", [one, e], I32), b.op("Sub", [one, e], I32)
        weight = b.op("Where", [positive, above, below], I32)
        return self.finish.emit(b, b.op("Mul", [d, weight], I32), name=name)


def gelu_step(read: Grid, made: Grid, bits: int = MULTIPLIER_BITS) -> GeluStep:
    """The constants between two grids of codes; ``bits``: width of the last multiplier."""
    scaled = np.rint(read.scale * ((1 << SHIFT) / (math.sqrt(2) * UNIT)))
    multiplier = np.minimum(scaled, EDGE << SHIFT).astype(np.int64)
    bound = 255 * 2 * ONE
    finish = requantize([read.scale / (2 * ONE)], np.zeros(()), [bound], made, bits)
    return GeluStep(np.asarray(read.zero, np.int64), squeeze(multiplier), finish)
