"""Percentile: the range that leaves out the outermost values.

It clips the massive tokens of a Vision Transformer by design: fine where they carry
nothing, ruinous where they do (AugReg ViT).
"""

from __future__ import annotations

import numpy as np

from ptq_onnx.calibration.statistics import Array, Histogram

PERCENTILE = 0.9999
"""PPQ's default: one value in ten thousand lies outside on either side."""


def percentile_range(
    histogram: Histogram, limits: tuple[int, int], symmetric: bool
) -> tuple[Array, Array]:
    """Bounds per row [R] that 1 - ``PERCENTILE`` of the values pass on each side."""
    edges, counts = histogram.finest
    total = counts.sum(axis=1, keepdims=True)
    share = np.cumsum(counts, axis=1) / np.maximum(total, 1)
    first = (share <= 1 - PERCENTILE).sum(axis=1)
    last = (share < PERCENTILE).sum(axis=1)
    row = np.arange(len(edges))
    low = edges[row, first]
    high = edges[row, np.maximum(last, first) + 1]
    return low.astype(np.float32), np.minimum(high, histogram.high).astype(np.float32)
