"""Logarithmic codes with a zero point: what softmax and GELU make lies dense at one end.

With τ codes to the octave, ℓ(k) = M 2^(-k/τ), ℓ(top) = 0, and a zero point z:

    value(k) = ℓ(k) - ℓ(z)

z = top: values from 0 to M, of attention maps, M being the row's maximum. z below top: values from
-ℓ(z) to M - ℓ(z), of GELU, which ends at -0.17. Zero is exact. Every value takes the nearest level.
Sources: AdaLog (arXiv 2407.12951) for the base that is not 2 and the shift of GELU; the zero point
that is a level is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.numerics.builder import Builder, V
from ptq_onnx.numerics.codes.code import TINY, Array, Code, Codes, Levels, Numbers, Solved
from ptq_onnx.numerics.codes.table import look_up

PARTS = 8
"""τ is counted in eighths."""
LEAST, MOST = 1, 256
"""Of τ, in eighths."""
REACH = 8
"""Octaves between the largest and the last level, where nothing else is known."""


def level(codes: NDArray[Any], top: int, eighths: int) -> NDArray[np.float64]:
    """ℓ / M of codes."""
    return np.where(codes >= top, 0.0, np.exp2(-np.asarray(codes, np.float64) * PARTS / eighths))


def border(eighths: int) -> float:
    """How many codes behind a level the middle lies between it and the next, below 1/2."""
    tau = eighths / PARTS
    return float(-tau * math.log2((1 + 2.0 ** (-1 / tau)) / 2))


@dataclass(frozen=True)
class Logarithmic(Code):
    """M is the scale, τ the detail ``eighths``."""

    name: ClassVar[str] = "logarithmic"
    details: ClassVar[Mapping[str, tuple[int, int]]] = {"eighths": (LEAST, MOST)}
    per_channel: ClassVar[bool] = False
    instead: ClassVar[str] = "--quantizer deploy gives uniform ones"

    def limits(self, bits: int, signed: bool) -> tuple[int, int]:
        """0 … 2^b - 1; the last means ℓ = 0."""
        return 0, (1 << bits) - 1

    def solve(self, low: Array, high: Array, bits: int, signed: bool, symmetric: bool) -> Solved:
        """Zero is the level next to where the range has it, M as large as it must be then."""
        low = np.maximum(-np.asarray(low, np.float64), 0)
        high = np.maximum(np.asarray(high, np.float64), 0)
        _, top = self.limits(bits, signed)
        eighths = int(np.clip(PARTS * top // REACH, LEAST, MOST))
        with np.errstate(divide="ignore"):
            part = np.log2((high + low) / np.maximum(low, TINY)) * eighths / PARTS
        zero = np.where(low > TINY, np.clip(np.rint(part), 0, top), top).astype(np.int32)
        unit = level(zero, top, eighths)
        above = high / np.where(unit < 1, 1 - unit, 1)
        below = np.where(unit > 0, low / np.where(unit > 0, unit, 1), 0)
        scale = np.maximum(np.maximum(above, below), TINY).astype(np.float32)
        return Solved(scale, zero, {"eighths": eighths})

    def codes(self, x: Array, numbers: Numbers) -> Codes:
        """The codes of the nearest levels."""
        largest, last, half = (np.float32(v) for v in self._ends(numbers))
        _, top = self.limits(numbers.bits, numbers.signed)
        eighths = numbers.details["eighths"]
        with np.errstate(over="ignore"):
            above = x + self._shift(numbers)
        inside = np.clip(above, last, largest).astype(np.float64)
        octaves = np.log2(inside) - np.log2(np.float64(largest))
        near = np.floor(-octaves * eighths / PARTS + (1 - border(eighths)))
        return np.asarray(np.where(above < half, top, np.clip(near, 0, top - 1)), np.int32)

    def values(self, codes: Codes, numbers: Numbers) -> Array:
        """ℓ(k) - ℓ(z)."""
        levels = self._levels(numbers)
        return levels[np.clip(codes, 0, len(levels) - 1)]

    def reach(self, numbers: Numbers) -> tuple[NDArray[Any], NDArray[Any]]:
        """-ℓ(z) and M - ℓ(z)."""
        _, top = self.limits(numbers.bits, numbers.signed)
        unit = level(numbers.zero_point, top, numbers.details["eighths"])
        return -unit * numbers.scale, (1 - unit) * numbers.scale

    def clipped(self, x: Array, numbers: Numbers) -> NDArray[np.bool_]:
        """Beyond half the first step above, or half the last below."""
        levels = self._levels(numbers).astype(np.float64)
        low, high = levels[-1], levels[0]
        first, final = levels[0] - levels[1], levels[-2] - levels[-1]
        return np.asarray((x > high + first / 2) | (x < low - final / 2))

    def emit(self, builder: Builder[V], value: V, numbers: Numbers) -> V:
        """Codes by the logarithm of what is above the last level, values from a table."""
        largest, last, half = self._ends(numbers)
        _, top = self.limits(numbers.bits, numbers.signed)
        eighths = numbers.details["eighths"]
        rate = eighths / PARTS
        # t = -τ log2(y / M) + 1 - border, in one Mul and one Add behind Log
        by = builder.constant("per_octave", np.float32(-rate / math.log(2)))
        offset = rate * math.log2(largest) + 1 - border(eighths)
        start = builder.constant("offset", np.float32(offset))
        span = (("last", last), ("largest", largest))
        ends = [builder.constant(name, np.float32(v)) for name, v in span]
        edge = builder.constant("half_of_last", np.float32(half))
        zero = builder.constant("zero", np.float32(0))
        before = builder.constant("before_top", np.float32(top - 1))
        final = builder.constant("top", np.float32(top))
        shift = self._shift(numbers)
        if shift:
            value = builder.op("Add", [value, builder.constant("shift", shift)], "shifted")
        at = builder.op("Clip", [value, *ends], "inside")
        at = builder.op("Log", [at], "log")
        at = builder.op("Mul", [at, by], "scaled_log")
        at = builder.op("Add", [at, start], "offset_log")
        at = builder.op("Floor", [at], "floor")
        at = builder.op("Clip", [at, zero, before], "level")
        none = builder.op("Less", [value, edge], "is_none", dtype=np.dtype(np.bool_))
        at = builder.op("Where", [none, final, at], "code")
        return look_up(builder, at, self._levels(numbers))

    def misfit(self, numbers: Numbers) -> str | None:
        """A zero point that is no code."""
        low, high = self.limits(numbers.bits, numbers.signed)
        if (numbers.zero_point < low).any() or (numbers.zero_point > high).any():
            return f"a zero point is not from {low} to {high}"
        return None

    def recognise(self, levels: Levels) -> bool:
        """Zero is a level, and above the last one every level is the same part of that before."""
        above = levels.astype(np.float64) - levels[-1]
        if len(levels) < 4 or 0 not in levels or not np.isfinite(above).all() or above[-2] <= 0:
            return False
        parts = np.log2(above[1:-1] / above[:-2])
        # Differences of levels in single precision
        slack = 4e-7 * max(1.0, float(np.abs(levels).max()) / float(above[-2]))
        eighths = -PARTS / float(np.mean(parts)) if np.all(parts < 0) else 0.0
        whole = LEAST <= round(eighths) <= MOST and abs(eighths / max(round(eighths), 1) - 1) < 1e-3
        return whole and bool(np.ptp(parts) <= max(slack, 1e-6))

    def _levels(self, numbers: Numbers) -> Array:
        """All values, by code."""
        _, top = self.limits(numbers.bits, numbers.signed)
        eighths, scale = numbers.details["eighths"], np.float64(np.ravel(numbers.scale)[0])
        found = level(np.arange(top + 1), top, eighths)
        zero = level(np.ravel(numbers.zero_point)[:1], top, eighths)
        return np.asarray((found - zero) * scale, np.float32)

    def _shift(self, numbers: Numbers) -> np.float32:
        """ℓ(z)."""
        _, top = self.limits(numbers.bits, numbers.signed)
        unit = level(np.ravel(numbers.zero_point)[:1], top, numbers.details["eighths"])
        return np.float32(unit[0] * np.float64(np.ravel(numbers.scale)[0]))

    def _ends(self, numbers: Numbers) -> tuple[float, float, float]:
        """M, the last level above zero, and half of that."""
        _, top = self.limits(numbers.bits, numbers.signed)
        scale = float(np.ravel(numbers.scale)[0])
        last = scale * float(level(np.array(top - 1), top, numbers.details["eighths"]))
        return scale, last, last / 2
