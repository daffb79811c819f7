"""What unseen images clip, and one range for all channels, by loops over images and channels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from ptq_onnx.calibration.robust import shared_range, tail_bound
from ptq_onnx.calibration.statistics import ChannelStatistics

Array = NDArray[np.float64]
CHANNELS, VALUES = 4, 3


def statistics(x: NDArray[np.float32]) -> ChannelStatistics:
    """Of images [N, T, C]."""
    found = ChannelStatistics.empty((1, x.shape[-1]))
    wide = x.astype(np.float64)
    found.update(x.min(1), x.max(1), (wide**2).sum((0, 1)), wide.sum((0, 1)), x[..., 0].size)
    return found


def beyond(extremes: Array, origin: Array, bound: float, power: Array, exponent: float) -> float:
    """Expected squared error per image above a bound, from the maxima [N, C] of all images."""
    images = len(extremes)
    sorted_ = -np.sort(-extremes, axis=0)[:16]
    kept = min(16, max(4, images // 4))
    records = tails = 0.0
    for c in range(CHANNELS):
        first, second = (float(v) - origin[c] for v in sorted_[:2, c])
        ratio = first / second if second > 1e-5 * abs(origin[c]) else 1.0
        largest = first * ratio**exponent + origin[c]
        records += power[c] * max(largest - bound, 0) ** 2 / (images + 1)
        if images >= kept:
            base = float(sorted_[kept - 1, c])
            width = max(float(np.mean(sorted_[: kept - 1, c])) - base, 1e-12)
            share = kept / images * math.exp(-max(bound - base, 0) / width)
            tails += power[c] * 2 * width**2 * share
    return max(records, tails)


def searched(
    x: Array, origin: Array, power: Array, levels: int, symmetric: bool, exponent: float
) -> tuple[float, float]:
    least, most = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if symmetric:
        least, most = -max(most, -least), max(most, -least)
    widths = [4 ** (k / 24) for k in range(25)]
    high, low = x.max(axis=1), x.min(axis=1)
    up = [beyond(high, origin, most * w, power, exponent) for w in widths]
    down = [beyond(-low, -origin, -least * w, power, exponent) for w in widths]
    best, found = math.inf, (least, most)
    for i, wide in enumerate(widths):
        for j, other in enumerate(widths):
            if symmetric and i != j:
                continue
            step = (most * wide - least * other) / (levels - 1)
            cost = up[i] + down[j] + VALUES * power.sum() * step**2 / 12
            if cost < best:
                best, found = cost, (least * other, most * wide)
    return found


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_range_is_the_best_of_625(seed: int, symmetric: bool) -> None:
    random = np.random.default_rng(seed)
    images = (3, 8, 24, 40, 70, 5)[seed]
    x = random.exponential(1, (images, VALUES, CHANNELS)) * np.exp(random.normal(size=CHANNELS))
    x[:, 0] *= -0.4
    x[seed % images, 1, 2] *= 9
    x = x.astype(np.float32)
    power, levels = random.uniform(0.1, 2, CHANNELS), (256, 16)[seed % 2]
    stats, origin = statistics(x), np.zeros(CHANNELS)
    for exponent in (0.0, 0.5, 1.0):
        found = shared_range(stats, power, levels, symmetric=symmetric, exponent=exponent)
        expected = searched(x.astype(float), origin, power, levels, symmetric, exponent)
        assert found == pytest.approx(expected, rel=1e-6)
    shift, factor = random.normal(size=CHANNELS), np.exp(random.normal(size=CHANNELS))
    moved = stats.moved(shift, factor)
    found = shared_range(moved, power, levels, symmetric=symmetric, exponent=0.7)
    shifted = ((x - shift) / factor).astype(np.float32).astype(float)
    expected = searched(shifted, -shift / factor, power, levels, symmetric, 0.7)
    assert found == pytest.approx(expected, rel=1e-5)


def test_one_sided_values_have_zero_at_the_end() -> None:
    x = np.full((3, VALUES, CHANNELS), 2, np.float32)
    assert shared_range(statistics(x), np.ones(CHANNELS), 256, symmetric=False) == (0.0, 2.0)
    assert shared_range(statistics(-x), np.ones(CHANNELS), 256, symmetric=False) == (-2.0, 0.0)
    found = shared_range(statistics(x[:1]), np.ones(CHANNELS), 256, symmetric=True)
    assert found == (-2.0, 2.0)


def test_a_power_below_zero_counts_nothing() -> None:
    x = np.random.default_rng(0).exponential(1, (20, VALUES, 2)).astype(np.float32)
    x[0, 0, 1] = 9
    stats = statistics(x)
    ranges = [
        shared_range(stats, np.array([1.0, p]), 16, symmetric=False, exponent=1) for p in (0, -3)
    ]
    assert ranges[0] == ranges[1]


def test_the_tail_by_hand() -> None:
    """Of three: x_3 + (mean(x_1, x_2) - x_3) ln(3 h); of two, or from two images, the largest."""
    extremes = np.array([[5.0], [4.0], [2.0]], np.float32)
    assert tail_bound(extremes, 3, 8.0)[0] == pytest.approx(2 + 2.5 * math.log(24))
    assert tail_bound(extremes, 9, 1.0)[0] == pytest.approx(5)
    assert tail_bound(extremes[:2], 9)[0] == tail_bound(extremes, 2)[0] == 5
    infinite = np.concatenate([extremes, np.full((3, 1), -np.inf, np.float32)])
    assert tail_bound(infinite, 3, 8.0)[0] == pytest.approx(2 + 2.5 * math.log(24))


def test_statistics_move_with_their_tensor() -> None:
    """(x - t) / f, then once more: as if measured so; zero goes along."""
    random = np.random.default_rng(1)
    x = random.normal(2, 1, (30, VALUES, CHANNELS)).astype(np.float32)
    t, f = random.normal(size=(2, CHANNELS))
    f = np.exp(f)
    found, fresh = statistics(x).moved(t, f), statistics(((x - t) / f).astype(np.float32))
    for name in ("highest", "lowest", "ema_low", "ema_high", "power", "total", "mean", "variance"):
        np.testing.assert_allclose(getattr(found, name), getattr(fresh, name), rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(found.origin, -t / f)
    np.testing.assert_allclose(found.moved(t, 2 * f).origin, (-t / f - t) / (2 * f))
    assert (found.count, found.images, found.shape) == (30 * VALUES, 30, (1, CHANNELS))
    index = np.array([0, 0, 3])
    part = found.take(index)
    assert part.shape == (1, 3)
    for name in ("ema_low", "ema_high", "power", "total", "origin", "second_moment"):
        np.testing.assert_array_equal(getattr(part, name), getattr(found, name)[index])
    for name in ("highest", "lowest"):
        np.testing.assert_array_equal(getattr(part, name), getattr(found, name)[:, index])
    assert statistics(x).take(index).origin is None
    whole = found.pooled()
    assert whole.shape == (1, 1)
    assert whole.ema_low == found.ema_low.min()
    assert whole.ema_high == found.ema_high.max()
    np.testing.assert_allclose(whole.total, found.total.sum())
    assert whole.images == 30


def test_records_by_hand() -> None:
    """Largest over second largest of the worse side; a side that is not beyond zero has none."""
    highs = np.float32([[4, 1, -1, 0, 3], [2, 1, -2, 0, 1.5], [1, 0, -3, 0, 1]])
    lows = np.float32([[-1, -1, -9, -1, 0], [-1, -5, -3, 0, 0], [-1, -1, -3, 0, 0]])
    found = ChannelStatistics.empty((5,))
    found.update(lows, highs, np.zeros(5, np.float32), np.zeros(5, np.float32), 3)
    np.testing.assert_allclose(found.record_ratio, [2, 5, 3, 1, 2])
    single = ChannelStatistics.empty((2,))
    single.update(-highs[:1, :2], highs[:1, :2], np.zeros(2), np.zeros(2), 1)  # type: ignore[arg-type]
    np.testing.assert_array_equal(single.record_ratio, 1)
    assert not ChannelStatistics.empty((2,)).mean.any()
    assert not ChannelStatistics.empty((2,)).second_moment.any()
