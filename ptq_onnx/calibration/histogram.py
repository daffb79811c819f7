"""Histograms of fixed size that are finer around zero.

A single value far out stretches equal bins until all others lie in a few of them, and no range
could then be told from another. So the bins around zero are counted again in finer ones, and
the finer ones around zero once more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Double = NDArray[np.float64]

BINS = 2048
"""Bins of equal width per tensor or channel."""
FINE = 1024
"""Bins that each ``SHARE``-th part around zero is counted in again."""
SHARE = 32
DEPTH = 2
"""How often."""


@dataclass
class Histogram:
    """Counts [R, BINS] of the values in [low, high] ([R] each); R = 1 or one per channel.

    ``inner``: a part of the bins around zero in finer ones; ``start`` [R]: the first of them.
    """

    low: Double
    high: Double
    counts: NDArray[np.int64]
    inner: Histogram | None = None
    start: NDArray[np.int64] | None = None

    @classmethod
    def over(cls, low: Array, high: Array) -> Histogram:
        """Empty, over a range that is known beforehand."""
        low64, high64 = low.astype(np.float64), high.astype(np.float64)
        high64 = np.maximum(high64, low64 + np.maximum(1e-8 * np.abs(low64), 1e-12))
        return cls._nested(low64, high64, BINS, DEPTH)

    @classmethod
    def _nested(cls, low: Double, high: Double, bins: int, depth: int) -> Histogram:
        found = cls(low, high, np.zeros((len(low), bins), np.int64))
        if depth:
            width, part = (high - low) / bins, bins // SHARE
            zero = (np.clip(0, low, high) - low) / width
            found.start = np.clip(np.floor(zero) - part // 2, 0, bins - part).astype(np.int64)
            begin = low + found.start * width
            found.inner = cls._nested(begin, begin + part * width, FINE, depth - 1)
        return found

    def add(self, rows: Array) -> None:
        """Count values [R, n]; those outside the range go to the edge bins."""
        index = self._places(rows)
        self._count(index)
        if self.inner is not None and self.start is not None:
            self.inner._add_part(rows, self._is_inner(index))

    def emptied(self) -> Histogram:
        """Nothing counted yet, over the same ranges."""
        return Histogram._nested(self.low, self.high, BINS, DEPTH)

    def join(self, other: Histogram) -> None:
        """Count what another one over the same ranges has counted; whole numbers, so that any
        order gives the same."""
        self.counts += other.counts
        if self.inner is not None and other.inner is not None:
            self.inner.join(other.inner)

    def _add_part(self, rows: Array, chosen: NDArray[np.bool_]) -> None:
        """Count the chosen ones alone."""
        # What bins of a float32 place cannot tell apart still belongs where it was chosen
        if len(rows) == 1:
            rows = rows[:, chosen[0]]
            index = self._places(rows)
            self._count(index)
            chosen = np.ones(index.shape, bool)
        else:
            index = self._places(rows)
            self._count(index, chosen)
        if self.inner is not None:
            self.inner._add_part(rows, chosen & self._is_inner(index))

    def _places(self, rows: Array) -> NDArray[np.int32]:
        bins = self.counts.shape[1]
        scale = (bins / (self.high - self.low)).astype(np.float32)
        place = (rows - self.low.astype(np.float32)[:, None]) * scale[:, None]
        return np.asarray(np.clip(place, 0, bins - 1, out=place).astype(np.int32))

    def _count(self, index: NDArray[np.int32], chosen: NDArray[np.bool_] | None = None) -> None:
        rows, bins = self.counts.shape
        flat = index + (np.arange(rows, dtype=np.int32) * bins)[:, None]
        flat = flat.ravel() if chosen is None else flat[chosen]
        self.counts += np.bincount(flat, minlength=self.counts.size).reshape(rows, bins)

    def _is_inner(self, index: NDArray[np.int32]) -> NDArray[np.bool_]:
        assert self.start is not None
        part = self.counts.shape[1] // SHARE
        first = self.start[:, None].astype(np.int32)
        return np.asarray((index >= first) & (index < first + part))

    @property
    def centres(self) -> Double:
        """The values that the bins of equal width stand for, [R, BINS]."""
        bins = self.counts.shape[1]
        width = (self.high - self.low) / bins
        return np.asarray(self.low[:, None] + width[:, None] * (np.arange(bins) + 0.5))

    @property
    def finest(self) -> tuple[Double, NDArray[np.int64]]:
        """Edges [R, N + 1] and counts [R, N] with the finest bins there are, ascending."""
        bins = self.counts.shape[1]
        width = (self.high - self.low) / bins
        edges = self.low[:, None] + width[:, None] * np.arange(bins + 1)
        if self.inner is None or self.start is None:
            return edges, self.counts
        inner, counted = self.inner.finest
        part, more = bins // SHARE, counted.shape[1]
        place = np.arange(bins - part + more + 1)[None]
        first = self.start[:, None]
        before, behind = place < first, place >= first + more
        outer = np.where(before, place, np.where(behind, place - more + part, 0))
        within = np.clip(place - first, 0, more)
        either = before | behind
        joined = np.where(
            either,
            np.take_along_axis(edges, outer, axis=1),
            np.take_along_axis(inner, within, axis=1),
        )
        last = slice(0, place.shape[1] - 1)
        counts = np.where(
            either[:, last],
            np.take_along_axis(self.counts, np.minimum(outer[:, last], bins - 1), axis=1),
            np.take_along_axis(counted, np.minimum(within[:, last], more - 1), axis=1),
        )
        return joined, counts
