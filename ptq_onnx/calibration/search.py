"""Squared error of uniform quantization on a histogram: what the range searches share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.numerics.codes.uniform import asymmetric_scale, symmetric_scale

Double = NDArray[np.float64]

NARROW = 1 / 16
"""A bin of at most this part of a step stands for its centre; in a wider one values lie evenly.
All of a bin at its centre would be right or wrong by where the centre falls between two codes."""
ROWS = 64
"""Rows at a time: what is computed for them fits a cache."""
TAIL = np.geomspace(2.0**-10, 0.1, 40)[-2::-1]
"""Shares of the range below a tenth: where one value in a million stretched it."""


def error_of(
    edges: Double,
    counts: NDArray[np.int64] | Double,
    low: Double,
    high: Double,
    limits: tuple[int, int],
    symmetric: bool,
) -> Double:
    """Σ count · E[(v - Q(v))²] per row [R] when [low, high] ([R] each) is the range, from the edges
    [R, N + 1] and the counts [R, N] of bins in which values lie evenly."""
    low32, high32 = low.astype(np.float32), high.astype(np.float32)
    if symmetric:
        scale, zero = symmetric_scale(low32, high32, limits), np.zeros(len(low), np.int32)
    else:
        scale, zero = asymmetric_scale(low32, high32, limits)
    step = scale.astype(np.float64)
    found = np.empty(len(edges))
    counts = np.asarray(counts, np.float64)
    for start in range(0, len(edges), ROWS):
        part = slice(start, start + ROWS)
        codes = edges[part] / step[part, None]
        found[part] = np.einsum(
            "rn,rn->r", counts[part], _mean_error(codes, zero[part, None], limits)
        )
    return np.asarray(found * step**2, np.float64)


def _mean_error(edges: Double, zero: NDArray[np.int32], limits: tuple[int, int]) -> Double:
    """Mean of (y - code)² over each bin; edges [R, N + 1] in steps."""
    smallest, largest = limits[0] - zero, limits[1] - zero

    def rest(y: Double) -> tuple[Double, Double]:
        code = np.rint(y)
        np.clip(code, smallest, largest, out=code)
        return code, y - code

    # The integral of (y - code)² up to y: a twelfth per code passed, and a cubic since the last
    integral, left = rest(edges)
    integral /= 12
    integral += left * left * left / 3
    width = np.diff(edges)
    even = np.diff(integral)
    even /= np.maximum(width, NARROW)
    narrow = width <= NARROW
    if narrow.any():
        centre = rest(edges[:, :-1] + width / 2)[1]
        np.copyto(even, centre * centre, where=narrow)
    return even


def take_better(
    best: tuple[Double, Double, Double], error: Double, low: Double, high: Double
) -> tuple[Double, Double, Double]:
    """Per row the range with the smaller error: (error, low, high)."""
    better = error < best[0]
    return (
        np.where(better, error, best[0]),
        np.where(better, low, best[1]),
        np.where(better, high, best[2]),
    )
