"""MSE: each bound searched by itself for the least squared error (PPQ's MSE observer)."""

from __future__ import annotations

import numpy as np

from ptq_onnx.calibration.search import TAIL, error_of, take_better
from ptq_onnx.calibration.statistics import Array, Histogram

SHARES = np.concatenate([np.linspace(1.0, 0.1, 25), TAIL[::2]])
"""Of the range, first of both bounds, then of each …"""
NEAR = np.linspace(0.9, 1.1, 11)
"""… and of what was found, in the rounds behind that."""
ROUNDS = 2


def mse_range(
    histogram: Histogram, limits: tuple[int, int], symmetric: bool
) -> tuple[Array, Array]:
    """Lower and upper bound per row, [R] each, by coordinate descent over the two bounds.

    Symmetric codes have one bound: both move together.
    """
    rows, bins = len(histogram.low), histogram.finest
    best = (np.full(rows, np.inf), histogram.low, histogram.high)
    apart = () if symmetric else ((True, False), (False, True))
    for number in range(1 + ROUNDS):
        for moves in ((True, True), *apart):
            start = best[1:] if number else (histogram.low, histogram.high)
            for share in NEAR if number else SHARES:
                low = np.maximum(start[0] * share, histogram.low) if moves[0] else best[1]
                high = np.minimum(start[1] * share, histogram.high) if moves[1] else best[2]
                error = error_of(*bins, low, high, limits, symmetric)
                best = take_better(best, error, low, high)
    return best[1].astype(np.float32), best[2].astype(np.float32)
