"""A range that holds on images calibration did not see.

Massive activations are rare: a channel's largest value on N images says little about the
next thousand. The largest per-image extremes of a channel are taken as the tail of an
exponential distribution (the Gumbel case of extreme value theory, Pickands 1975; the mean
excess over the k-th largest estimates its width), and the range is put where one image in
``HORIZON`` × N is expected to pass it, the width being an estimate.

What holds: the width is an estimate, so that exponential tails pass 1.8 times as often (a wider
range that keeps the promise was tried: ViT-Ti and DeiT-Ti lose half a dB in ``deploy``). On ViT-Ti,
128 images seen and 500 not, an image passes the range of a tensor in 2.3 of a thousand cases, 1.0
being promised, and with min-max in 13.9; softmax, which is bounded by 1 anyway, in 11.8
(``benchmarks/ranges.py``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.calibration.statistics import ChannelStatistics

Array = NDArray[np.float32]
Double = NDArray[np.float64]

HORIZON = 8.0
"""The range would be passed once in this many times the calibration images, were the tail known."""


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


WIDTHS = np.geomspace(1.0, 4.0, 25)
"""Candidate ranges, as multiples of the widest that calibration saw."""


def shared_range(
    stats: ChannelStatistics,
    power: NDArray[np.float64],
    levels: int,
    *,
    symmetric: bool,
    exponent: float = 0.0,
) -> tuple[float, float]:
    """The range of one scale for all channels with the least expected error, on unseen images.

    Expected squared error per image, each channel weighted by ``power`` [C] (of the weight row
    that reads it): rounding, T step² / 12 for T values per channel and image, and clipping.

    Where channels were divided by factors that grow with their range to the power ``exponent``,
    the values seen fit that range because it was made of them. So each channel's largest image
    is left out: the second largest would have given the factor, and the largest would have
    come out (first / second)^exponent times as large. A new image breaks a channel's record with
    probability 1 / (N + 1), as any of N + 1 exchangeable images does; of 768 channels, six do
    on every image after 128. No assumption is made on the tail there; where an exponential one says
    that more is clipped, it counts (a class token has one value an image, and 16 images show
    little of it: 21.6 → 28.3 dB on a small network).
    What calibration saw is never clipped. Without two images the range seen is returned.
    """
    power = np.maximum(np.asarray(power, np.float64), 0)
    least = min(float(stats.lowest[0].min()), 0.0)
    most = max(float(stats.highest[0].max()), 0.0)
    if symmetric:
        most = max(most, -least)
        least = -most
    if stats.images < 2:
        return least, most
    values = stats.count / stats.images
    origin = np.zeros(stats.power.size) if stats.origin is None else stats.origin
    above = _clipping(stats.highest, origin, stats.images, most * WIDTHS, power, exponent)
    below = _clipping(-stats.lowest, -origin, stats.images, -least * WIDTHS, power, exponent)
    rounding = values * float(power.sum()) / 12 / (levels - 1) ** 2
    if symmetric:
        cost = above + below + rounding * (2 * most * WIDTHS) ** 2
        width = WIDTHS[int(np.argmin(cost))]
        return float(least * width), float(most * width)
    span = most * WIDTHS[:, None] - least * WIDTHS[None, :]
    cost = above[:, None] + below[None, :] + rounding * span**2
    up, down = np.unravel_index(int(np.argmin(cost)), cost.shape)
    return float(least * WIDTHS[down]), float(most * WIDTHS[up])


def _clipping(
    extremes: Array,
    origin: Double,
    images: int,
    bounds: Double,
    power: Double,
    exponent: float,
) -> Double:
    """Expected squared error per image beyond each bound [W], from maxima [k, C].

    Records are ratios to zero: where the tensor was shifted, to its ``origin`` [C].
    """
    first, second = extremes[:2].astype(np.float64) - origin
    # What is left of nothing after a shift in float32 is no record
    usable = second > 1e-5 * np.abs(origin)
    ratio = np.where(usable, first / np.where(usable, second, 1), 1.0)
    left_out = first * ratio**exponent + origin
    over = np.maximum(left_out - bounds[:, None], 0) ** 2
    records = np.asarray(over @ power / (images + 1), np.float64)
    return np.maximum(records, _beyond(extremes, images, bounds, power))


def _beyond(extremes: Array, images: int, bounds: Double, power: Double) -> Double:
    """The same from each channel's tail alone, taken as exponential: E[(x - b)²] is 2 β² times
    the share of images beyond b. Zero where there are too few."""
    k = min(len(extremes), max(LEAST, int(images * SHARE)))
    if images < k:
        return np.zeros(len(bounds))
    base = extremes[k - 1].astype(np.float64)
    width = np.maximum(extremes[: k - 1].astype(np.float64).mean(axis=0) - base, 1e-12)
    share = k / images * np.exp(-np.maximum(bounds[:, None] - base, 0) / width)
    return np.asarray((2 * width**2 * share) @ power, np.float64)


SHARE = 1 / 4
"""Part of the images whose extremes are a channel's tail …"""
LEAST = 4
"""… and how many they are at least."""
