"""Requantization: a fixed-point multiplier and a rounding right shift.

    y = clip(⌊(Σ_i a_i M_i + C) / 2^n⌋, low, high)

is clip(round(Σ_i a_i m_i + c)) with m_i ≈ M_i / 2^n and C = round(c 2^n) + 2^(n-1): rounding
is half up, towards +∞. c holds bias and zero point, so that a bias has a resolution of 2^-n
output steps. The largest |M_i| of a channel has ``bits`` bits (31 by default), M signed. The
shift is exact; the multiplier is off by at most half a unit, so that y differs from the
exactly scaled and rounded value only where that is within Σ_i |a_i| 2^-(n+1) + 2^-(n+1) of a
tie.

In ONNX: int64 products and sums, 2^62 added, which makes the sum positive and is a multiple
of 2^n, BitShift of uint64, and 2^62 / 2^n subtracted again. No sum reaches ±2^62.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ptq_onnx.targets.integer.builder import I64, U64, Builder, type_of_codes
from ptq_onnx.targets.integer.grid import Double, Grid, Ints

MULTIPLIER_BITS = 31
"""Default width of the multipliers."""

BIAS_BITS = 62
"""2^BIAS_BITS makes a signed sum positive before the shift."""

MAX_SHIFT = 46
"""Beyond it a ratio is so small that its multiplier gets fewer bits: zero ≪ n stays far below
2^60."""


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """The constants of one requantization; arrays broadcast against the output."""

    multipliers: tuple[Ints, ...]
    shift: Ints
    constant: Ints
    low: int
    high: int

    def __call__(self, *terms: Ints) -> Ints:
        """Codes of integer terms of the same shape."""
        total = self.constant
        for term, multiplier in zip(terms, self.multipliers, strict=True):
            total = total + term * multiplier
        return np.asarray(np.clip(total >> self.shift, self.low, self.high), np.int64)

    def emit(self, b: Builder, *terms: ir.Value, name: str = "") -> ir.Value:
        """The same in ONNX; uint8 codes, uint16 where they have more bits."""
        total: ir.Value | None = None
        for term, multiplier in zip(terms, self.multipliers, strict=True):
            product = b.op("Mul", [b.cast(term, I64), b.number(multiplier)], I64)
            total = product if total is None else b.op("Add", [total, product], I64)
        assert total is not None
        bias = np.int64(1) << np.int64(BIAS_BITS)
        lifted = b.op("Add", [total, b.number(self.constant + bias)], I64)
        shifted = b.shift(b.cast(lifted, U64), b.number(self.shift, U64))
        back = b.op("Sub", [b.cast(shifted, I64), b.number(bias >> self.shift)], I64)
        clipped = b.op("Clip", [back, b.number(self.low), b.number(self.high)], I64)
        return b.cast(clipped, type_of_codes(self.high), name=name)


def fixed_point(
    ratios: Sequence[Double],
    constant: Double,
    bounds: Sequence[int],
    limits: tuple[int, int],
    bits: int = MULTIPLIER_BITS,
) -> FixedPoint:
    """The constants for real ``ratios`` m_i and ``constant`` c, in output steps.

    ``bounds``: the largest |a_i|. n is the same for all terms of a channel.
    """
    ratios = [np.asarray(r, np.float64) for r in ratios]
    shape = np.broadcast_shapes(np.shape(constant), *(r.shape for r in ratios))
    largest = np.zeros(shape)
    for ratio in ratios:
        largest = np.maximum(largest, np.abs(ratio))
    _, exponent = np.frexp(largest)
    # A ratio just below a power of two is rounded up to it, which takes a bit more.
    carried = np.rint(np.ldexp(largest, bits - exponent)) >= 2.0**bits
    n = np.clip(bits - exponent.astype(np.int64) - carried, 0, MAX_SHIFT)
    # Room for the sum below 2^61: a shift less, the same for all, where the terms are wide.
    most = sum(
        int(bound) * float(np.max(np.abs(ratio) * np.exp2(n.astype(np.float64)), initial=0))
        for bound, ratio in zip(bounds, ratios, strict=True)
    )
    n = np.maximum(n - max(int(np.ceil(np.log2(max(most, 1.0)))) - 61, 0), 0)
    unit = np.exp2(n.astype(np.float64))
    cap = float((1 << bits) - 1)
    multipliers = tuple(np.clip(np.rint(r * unit), -cap, cap).astype(np.int64) for r in ratios)
    wanted = np.clip(np.rint(constant * unit), -(2.0**60), 2.0**60).astype(np.int64)
    half = np.where(n > 0, np.int64(1) << np.maximum(n - 1, 0), 0)
    return FixedPoint(
        tuple(squeeze(m) for m in multipliers), squeeze(n), squeeze(wanted + half), *limits
    )


def squeeze(array: Ints) -> Ints:
    """One number where all are the same."""
    if array.size and bool(np.all(array == array.flat[0])):
        return np.asarray(array.flat[0], np.int64)
    return np.asarray(array, np.int64)


def requantize(
    ratios: Sequence[Double],
    offset: Double,
    bounds: Sequence[int],
    out: Grid,
    bits: int = MULTIPLIER_BITS,
) -> FixedPoint:
    """From terms whose steps are ``ratios`` (real values) to the codes of a grid."""
    return fixed_point(
        [np.asarray(r, np.float64) / out.scale for r in ratios],
        np.asarray(offset / out.scale + out.zero, np.float64),
        bounds,
        (out.low, out.high),
        bits,
    )
