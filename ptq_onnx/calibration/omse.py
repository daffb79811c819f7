"""OMSE: the whole range shrunk step by step to the least squared error.

Source: Choukroun et al., arXiv 1902.06822, in FQ-ViT's form: both bounds shrink together, by
hundredths of the range down to a tenth, and by tenths from there on.
"""

from __future__ import annotations

import numpy as np

from ptq_onnx.calibration.search import TAIL, error_of, take_better
from ptq_onnx.calibration.statistics import Array, Histogram

SHRINK = np.concatenate([np.arange(100, 9, -1) / 100, TAIL])


def omse_range(
    histogram: Histogram, limits: tuple[int, int], symmetric: bool
) -> tuple[Array, Array]:
    """Lower and upper bound per row, [R] each."""
    rows, (edges, counts) = len(histogram.low), histogram.finest
    bins = edges, counts.astype(np.float64)
    best = (np.full(rows, np.inf), histogram.low, histogram.high)
    for shrink in SHRINK:
        low, high = histogram.low * shrink, histogram.high * shrink
        error = error_of(*bins, low, high, limits, symmetric)
        best = take_better(best, error, low, high)
    return best[1].astype(np.float32), best[2].astype(np.float32)
