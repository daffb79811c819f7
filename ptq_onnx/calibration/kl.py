"""KL: the range whose quantized histogram loses the least information.

Source: Migacz, "8-bit inference with TensorRT", GTC 2017. P is the histogram clipped to the
range, the clipped mass on its edge bins; Q merges P's bins into the quantization levels and
spreads each level's mass over its occupied bins; the range with the least D(P‖Q) wins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.calibration.statistics import Array, Histogram

SHRINK = np.linspace(1.0, 0.1, 46)


def kl_range(histogram: Histogram, limits: tuple[int, int], symmetric: bool) -> tuple[Array, Array]:
    """Lower and upper bound per row, [R] each; all rows are searched at once."""
    # Of more levels than bins each has at most one bin: only what is clipped is lost.
    levels = min(limits[1] - limits[0] + 1, histogram.counts.shape[1])
    values, counts = histogram.centres, histogram.counts.astype(np.float64)
    reach = np.maximum(np.abs(histogram.low), np.abs(histogram.high))
    start_low = -reach if symmetric else np.minimum(histogram.low, 0)
    start_high = reach if symmetric else np.maximum(histogram.high, 0)
    least = np.full(len(values), np.inf)
    low, high = start_low, start_high
    for shrink in SHRINK:
        candidate_low, candidate_high = start_low * shrink, start_high * shrink
        loss = divergence(values, counts, candidate_low, candidate_high, levels)
        better = loss < least
        least = np.where(better, loss, least)
        low = np.where(better, candidate_low, low)
        high = np.where(better, candidate_high, high)
    return low.astype(np.float32), high.astype(np.float32)


def divergence(
    values: NDArray[np.float64],
    counts: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    levels: int,
) -> NDArray[np.float64]:
    """D(P‖Q) per row for histograms [R, B] cut to [low, high] in ``levels`` levels."""
    rows, bins = counts.shape
    inside = (values >= low[:, None]) & (values <= high[:, None])
    p = np.where(inside, counts, 0)
    row = np.arange(rows)
    p[row, inside.argmax(axis=1)] += np.where(values < low[:, None], counts, 0).sum(axis=1)
    last = bins - 1 - inside[:, ::-1].argmax(axis=1)
    p[row, last] += np.where(values > high[:, None], counts, 0).sum(axis=1)
    span = np.maximum(high - low, 1e-30)[:, None]
    level = np.clip((values - low[:, None]) / span * levels, 0, levels - 1).astype(np.int64)
    index = (level + row[:, None] * levels).ravel()
    mass = np.bincount(index, np.where(inside, counts, 0).ravel(), rows * levels)
    occupied = np.bincount(index, (inside & (counts > 0)).ravel().astype(float), rows * levels)
    spread = (mass / np.maximum(occupied, 1))[index].reshape(rows, bins)
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    q = np.where(inside & (counts > 0), spread, 0)
    q_share = np.maximum(q / np.maximum(q.sum(axis=1, keepdims=True), 1e-30), 1e-12)
    p_share = p / total
    terms = np.where(p_share > 0, p_share * np.log(np.maximum(p_share, 1e-30) / q_share), 0)
    return np.asarray(terms.sum(axis=1))
