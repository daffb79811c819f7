"""Squared error of uniform quantization on a histogram: what the range searches share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.calibration.statistics import Histogram
from ptq_onnx.quantizers.uniform import asymmetric_scale, symmetric_scale

Double = NDArray[np.float64]


def squared_error(
    histogram: Histogram,
    low: Double,
    high: Double,
    limits: tuple[int, int],
    symmetric: bool,
) -> Double:
    """Σ count · (v - Q(v))² per row [R] when [low, high] ([R] each) is the range."""
    low32, high32 = low.astype(np.float32), high.astype(np.float32)
    if symmetric:
        scale, zero = symmetric_scale(low32, high32, limits), np.zeros(len(low), np.int32)
    else:
        scale, zero = asymmetric_scale(low32, high32, limits)
    values = histogram.centres
    step = scale.astype(np.float64)[:, None]
    codes = np.clip(np.rint(values / step) + zero[:, None], *limits)
    error = values - (codes - zero[:, None]) * step
    return np.asarray((histogram.counts * error**2).sum(axis=1), np.float64)


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
