"""MSE: each bound searched by itself for the least squared error (PPQ's MSE observer)."""

from __future__ import annotations

import numpy as np

from ptq_onnx.calibration.search import squared_error, take_better
from ptq_onnx.calibration.statistics import Array, Histogram

SHARES = np.linspace(0.1, 1.0, 25)


def mse_range(
    histogram: Histogram, limits: tuple[int, int], symmetric: bool
) -> tuple[Array, Array]:
    """Lower and upper bound per row, [R] each, by coordinate descent over the two bounds."""
    rows = len(histogram.low)
    best = (np.full(rows, np.inf), histogram.low, histogram.high)
    for _ in range(2):
        for share in SHARES:
            low, high = histogram.low * share, best[2]
            error = squared_error(histogram, low, high, limits, symmetric)
            best = take_better(best, error, low, high)
        for share in SHARES:
            low, high = best[1], histogram.high * share
            error = squared_error(histogram, low, high, limits, symmetric)
            best = take_better(best, error, low, high)
    return best[1].astype(np.float32), best[2].astype(np.float32)
