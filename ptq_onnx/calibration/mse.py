"""MSE: each bound searched by itself for the least squared error (PPQ's MSE observer)."""

from __future__ import annotations

import numpy as np

from ptq_onnx.calibration.search import TAIL, error_of, take_better
from ptq_onnx.calibration.statistics import Array, Histogram

SHARES = np.concatenate([np.linspace(1.0, 0.1, 25), TAIL[::2]])
"""Of the range: both bounds together."""
FURTHER = (np.geomspace(1 / 16, 4, 13), np.array([0.9, 0.95, 1.05, 1.1]), 1 + np.arange(-3, 4) / 80)
"""Of what was found, in the rounds behind that."""


def mse_range(
    histogram: Histogram, limits: tuple[int, int], symmetric: bool
) -> tuple[Array, Array]:
    """Lower and upper bound per row, [R] each, by coordinate descent over the two bounds.

    Symmetric codes have one bound: both move together.
    """
    rows, (edges, counts) = len(histogram.low), histogram.finest
    bins = edges, counts.astype(np.float64)
    best = (np.full(rows, np.inf), histogram.low, histogram.high)
    apart = () if symmetric else ((True, False), (False, True))
    for number, shares in enumerate((SHARES, *FURTHER)):
        for moves in ((True, True), *(apart if number else ())):
            start = best[1:]
            for share in shares:
                low = np.maximum(start[0] * share, histogram.low) if moves[0] else best[1]
                high = np.minimum(start[1] * share, histogram.high) if moves[1] else best[2]
                error = error_of(*bins, low, high, limits, symmetric)
                best = take_better(best, error, low, high)
    return best[1].astype(np.float32), best[2].astype(np.float32)
