"""A range that holds on images calibration did not see.

Massive activations are rare: a channel's largest value on N images says little about the
next thousand. The largest per-image extremes of a channel are taken as the tail of an
exponential distribution (the Gumbel case of extreme value theory, Pickands 1975; the mean
excess over the k-th largest estimates its width), and the range is put where one image in
``HORIZON`` × N is expected to pass it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.calibration.statistics import ChannelStatistics

Array = NDArray[np.float32]

HORIZON = 8.0
"""The range is expected to be passed once in this many times the calibration images."""


def tail_bound(extremes: Array, images: int, horizon: float = HORIZON) -> Array:
    """Upper bound per channel from descending per-image maxima [k, C] of ``images`` images.

    bound = x_k + β ln(k · horizon), β = mean(x_1 … x_{k-1}) - x_k. Never below the largest
    value seen. Returns [C].
    """
    k = min(len(extremes), images)
    largest = extremes[0]
    if k < 3:
        return np.asarray(largest, np.float32)
    base = extremes[k - 1]
    width = extremes[: k - 1].mean(axis=0) - base
    bound = np.maximum(largest, base + width * np.float32(np.log(k * horizon)))
    return np.asarray(bound, np.float32)


def robust_range(stats: ChannelStatistics, horizon: float = HORIZON) -> tuple[Array, Array]:
    """Lower and upper bound per channel, [C] each; a bound does not cross zero."""
    high = tail_bound(stats.highest, stats.images, horizon)
    low = -tail_bound(-stats.lowest, stats.images, horizon)
    smallest, largest = stats.lowest[0], stats.highest[0]
    return np.where(smallest >= 0, smallest, low), np.where(largest <= 0, largest, high)
