"""Twin-uniform codes (PTQ4ViT, arXiv 2111.12293, section 3.2): two ranges, a power of two apart.

A code of k bits has one bit for its range and k - 1 for its size, H = 2^(k-1); s2 = 2^m s1.

Without a sign, for attention maps: 0 … H-1 are steps s1, H … 2H-1 are steps s2 from zero. Where
the paper takes the fine range up to H s1, here every value goes to the nearest level: the border is
half way between (H-1) s1 and the level of s2 above it. On [0, 1], s2 is 1 / H as in the paper.

With a sign, for what GELU makes: codes below zero are steps s1, codes above zero steps s2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.numerics.builder import Builder, V
from ptq_onnx.numerics.codes.code import TINY, Array, Code, Codes, Levels, Numbers, Solved
from ptq_onnx.numerics.codes.table import look_up

LEAST, MOST = 1, 16
"""Of m."""
RATIO = 4
"""m of the fine range [0, 2^-m) of values on [0, 1], where nothing else is known."""
HIGHER = 128
"""Codes with a sign are held so much higher in uint8."""


def half(bits: int) -> int:
    """Levels of each range."""
    return 1 << (bits - 1)


def border(bits: int, ratio: int) -> float:
    """Up to where values belong to the fine range, in steps of it."""
    last, coarse = half(bits) - 1, 1 << ratio
    return (last + coarse * (last // coarse + 1)) / 2


def attention_ratio(second_moment: float) -> int:
    """m of an attention map with that E[x²]: of the expected squared error the part that it moves,
    4^-m + P(x >= 2^-m), is least where 4^-m is √E[x²], by P(x >= t) <= E[x²] / t²."""
    return int(np.clip(np.rint(-np.log2(max(second_moment, 1e-30)) / 4), LEAST, MOST))


@dataclass(frozen=True)
class Twin(Code):
    """Two ranges of steps ``scale`` and 2^``ratio`` · ``scale``; zero points are zero."""

    name: ClassVar[str] = "twin"
    details: ClassVar[dict[str, tuple[int, int]]] = {"ratio": (LEAST, MOST)}
    per_channel: ClassVar[bool] = False
    instead: ClassVar[str] = "--quantizer deploy gives uniform ones"

    def limits(self, bits: int, signed: bool) -> tuple[int, int]:
        """Smallest and largest code: half of them for each range, the signed ones around 0."""
        return (1 - half(bits), half(bits) - 1) if signed else (0, 2 * half(bits) - 1)

    def solve(self, low: Array, high: Array, bits: int, signed: bool, symmetric: bool) -> Solved:
        """One ratio for all bounds. With a sign the steps cover both sides, and m is the largest
        with which the fine one is no coarser than it must be; without, s2 is ``high`` / H."""
        low = np.maximum(-np.asarray(low, np.float64), 0)
        high = np.maximum(np.asarray(high, np.float64), 0)
        ratio = RATIO
        if signed:
            apart = np.log2(max(float(high.max()), TINY) / max(float(low.max()), TINY))
            ratio = int(np.clip(np.floor(apart), LEAST, MOST))
            last = half(bits) - 1
            scale = np.maximum(high / last / 2.0**ratio, low / last)
        else:
            scale = high / half(bits) / 2.0**ratio
        scale = np.maximum(scale, TINY).astype(np.float32)
        return Solved(scale, np.zeros(scale.shape, np.int32), {"ratio": ratio})

    def codes(self, x: Array, numbers: Numbers) -> Codes:
        """Of the fine range where it reaches, else of the coarse one; signed: fine below 0, coarse
        above."""
        fine, coarse = self._steps(numbers)
        last = half(numbers.bits) - 1
        with np.errstate(over="ignore"):
            units = x / fine
            above = np.clip(np.rint(x / coarse), 0, last)
            if numbers.signed:
                return np.asarray(above - np.clip(np.rint(x / -fine), 0, last), np.int32)
            near = units <= np.float32(border(numbers.bits, numbers.details["ratio"]))
            below = np.clip(np.rint(units), 0, last)
        return np.asarray(np.where(near, below, above + last + 1), np.int32)

    def values(self, codes: Codes, numbers: Numbers) -> Array:
        """Codes times the step of their range, float32."""
        fine, coarse = self._steps(numbers)
        units = codes.astype(np.float32)
        if numbers.signed:
            return np.asarray(units * np.where(codes < 0, fine, coarse), np.float32)
        count = np.float32(half(numbers.bits))
        return np.where(units < count, units * fine, (units - count) * coarse).astype(np.float32)

    def reach(self, numbers: Numbers) -> tuple[NDArray[Any], NDArray[Any]]:
        """From 0, or the least of the fine range where codes have a sign, to the most of the coarse
        range."""
        last, coarse = half(numbers.bits) - 1, numbers.scale * 2.0 ** numbers.details["ratio"]
        low = -last if numbers.signed else 0
        return low * numbers.scale, last * coarse

    def clipped(self, x: Array, numbers: Numbers) -> NDArray[np.bool_]:
        """What lies more than half a step of its range beyond either end."""
        low, high = self.reach(numbers)
        fine, coarse = self._steps(numbers)
        return np.asarray((x < low - fine / 2) | (x > high + coarse / 2))

    def emit(self, builder: Builder[V], value: V, numbers: Numbers) -> V:
        """Both ranges by division, rounding and Clip, one chosen; values from a table. Every step
        is exact or rounded as in ``codes``, so that both agree to the last bit."""
        fine, coarse = self._steps(numbers)
        last = half(numbers.bits) - 1
        ends = [builder.constant(name, np.float32(v)) for name, v in (("zero", 0), ("last", last))]
        step = builder.constant("coarse_step", np.float32(coarse))
        above = builder.op("Div", [value, step], "coarse_units")
        above = builder.op("Round", [above], "coarse_rounded")
        above = builder.op("Clip", [above, *ends], "coarse")
        sign = -1 if numbers.signed else 1
        step = builder.constant("fine_step", np.float32(sign * fine))
        units = builder.op("Div", [value, step], "fine_units")
        below = builder.op("Round", [units], "fine_rounded")
        below = builder.op("Clip", [below, *ends], "fine")
        if numbers.signed:
            higher = builder.constant("higher", np.float32(HIGHER))
            level = builder.op("Sub", [above, below], "signed")
            level = builder.op("Add", [level, higher], "level")
            table = self.values(np.arange(2 * HIGHER, dtype=np.int32) - HIGHER, numbers)
            return look_up(builder, level, table)
        count = builder.constant("levels_of_one", np.float32(last + 1))
        most = np.float32(border(numbers.bits, numbers.details["ratio"]))
        edge = builder.constant("border", most)
        above = builder.op("Add", [above, count], "coarse_level")
        near = builder.op("LessOrEqual", [units, edge], "is_fine", dtype=np.dtype(np.bool_))
        level = builder.op("Where", [near, below, above], "level")
        table = self.values(np.arange(2 * last + 2, dtype=np.int32), numbers)
        return look_up(builder, level, table)

    def misfit(self, numbers: Numbers) -> str | None:
        """A zero point other than 0."""
        return "its zero point is not 0" if np.any(numbers.zero_point) else None

    def recognise(self, levels: Levels) -> bool:
        """Steps of one size up to the middle, of another, a power of two apart, behind it; with a
        sign the middle is zero."""
        count = len(levels) // 2
        if len(levels) < 4 or count & (count - 1) or len(levels) % 2:
            return False
        signed = bool(levels[0] < 0)
        fine, coarse = -levels[count - 1], levels[count + 1]
        if not signed:
            fine = levels[1]
        if not 0 < fine < coarse < np.inf:
            return False
        ratio = int(np.rint(np.log2(float(coarse) / float(fine))))
        bits, low = count.bit_length(), -count if signed else 0
        scale, zero = np.asarray(fine, np.float32), np.asarray(0, np.int32)
        numbers = Numbers(bits, signed, scale, zero, {"ratio": ratio})
        found = self.values(np.arange(len(levels), dtype=np.int32) + low, numbers)
        return np.array_equal(found, levels)

    @staticmethod
    def _steps(numbers: Numbers) -> tuple[Array, Array]:
        fine = np.asarray(numbers.scale, np.float32)
        return fine, fine * np.float32(2.0 ** numbers.details["ratio"])
