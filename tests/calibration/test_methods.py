"""Calibration methods: known answers, what each promises, and KL against a slow reference."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ptq_onnx.calibration.kl import divergence
from ptq_onnx.calibration.methods import (
    FROM_EXTREMES,
    FROM_HISTOGRAM,
    FROM_PRODUCTS,
    ChannelStatistics,
    Histogram,
    Statistics,
    ranges,
)
from ptq_onnx.calibration.percentile import PERCENTILE
from ptq_onnx.calibration.robust import HORIZON, tail_bound
from ptq_onnx.calibration.search import error_of
from ptq_onnx.calibration.statistics import BINS, TOP
from ptq_onnx.config.names import METHOD_NAMES

Array = NDArray[np.float32]
LIMITS = [(-128, 127), (0, 255), (-8, 7), (0, 15)]


def histogram(*rows: Sequence[float] | Array) -> Histogram:
    """Counts of the rows' values between their own extremes."""
    values = [np.asarray(row, np.float32) for row in rows]
    found = Histogram.over(np.array([v.min() for v in values]), np.array([v.max() for v in values]))
    found.add(np.stack(values))
    return found


def statistics(*batches: Array) -> ChannelStatistics:
    """Statistics of batches [B, n, C]: channels last."""
    stats = ChannelStatistics.empty((1, batches[0].shape[-1]))
    for batch in batches:
        x = batch.astype(np.float32)
        power = (x.astype(np.float64) ** 2).sum(axis=(0, 1))
        total = x.astype(np.float64).sum(axis=(0, 1))
        stats.update(x.min(axis=1), x.max(axis=1), power, total, x.shape[0] * x.shape[1])
    return stats


def laplace(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).laplace(0, 1, shape).astype(np.float32)


def both(method: str, data: Array, limits: tuple[int, int]) -> tuple[Array, Array]:
    """Range per channel of data [images, n, C]."""
    stats = Statistics({"x": statistics(*np.split(data, 4))})
    stats.histograms["x"] = histogram(*data.reshape(-1, data.shape[-1]).T)
    return ranges(stats, "x", method, limits, symmetric=limits[0] < 0, per_channel=True)


# --- all methods ------------------------------------------------------------------------------


def test_every_method_has_one_home() -> None:
    homes = [*FROM_EXTREMES, *FROM_HISTOGRAM, *FROM_PRODUCTS]
    assert sorted(METHOD_NAMES) == sorted(homes)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_per_channel_is_each_channel_alone(method: str, limits: tuple[int, int]) -> None:
    data = laplace(16, 50, 5) * np.float32([0.01, 1, 3, 100, 1]) + np.float32([0, 0, 2, 0, -40])
    low, high = both(method, data, limits)
    assert low.shape == high.shape == (5,)
    for channel in range(5):
        alone = both(method, data[:, :, channel : channel + 1], limits)
        np.testing.assert_allclose(low[channel], alone[0][0], rtol=1e-6)
        np.testing.assert_allclose(high[channel], alone[1][0], rtol=1e-6)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_order_of_batches(method: str) -> None:
    """Matters to the moving average alone."""
    data = laplace(16, 50, 3) * np.arange(1, 17, dtype=np.float32)[:, None, None]
    one, other = both(method, data, (-128, 127)), both(method, data[::-1].copy(), (-128, 127))
    same = all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert same is (method != "ema")


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-30, 1e6, -1e30])
def test_constant_tensors_stay_finite(method: str, limits: tuple[int, int], value: float) -> None:
    low, high = both(method, np.full((4, 3, 2), value, np.float32), limits)
    assert np.isfinite(low).all()
    assert np.isfinite(high).all()
    assert np.all(low <= high)
    covered = max(abs(float(low[0])), abs(float(high[0])))
    assert covered >= 0.999 * abs(np.float32(value))


@pytest.mark.parametrize("method", [m for m in METHOD_NAMES if m not in ("robust",)])
def test_no_method_but_robust_leaves_the_data(method: str) -> None:
    """The others clip or cover; a symmetric KL range is as wide as the farther side."""
    data = laplace(16, 50, 3)
    for limits in LIMITS:
        low, high = both(method, data, limits)
        reach = np.abs(data).max(axis=(0, 1)) * 1.0001
        assert np.all(low >= -reach)
        assert np.all(high <= reach)
        assert np.all(low <= 0)
        assert np.all(high >= 0)


# --- from extremes ----------------------------------------------------------------------------


def test_minmax_and_ema_known_answers() -> None:
    batches = [np.array([[[a], [b]]], np.float32) for a, b in ((-1, 2), (-3, 1), (0, 10))]
    stats = Statistics({"x": statistics(*batches)})
    kw = {"symmetric": True, "per_channel": True}
    assert ranges(stats, "x", "minmax", (-128, 127), **kw) == (-3, 10)
    low, high = ranges(stats, "x", "ema", (-128, 127), **kw)
    assert low[0] == pytest.approx(0.99 * (0.99 * -1 + 0.01 * -3) + 0.01 * 0)
    assert high[0] == pytest.approx(0.99 * (0.99 * 2 + 0.01 * 1) + 0.01 * 10)


@pytest.mark.parametrize("method", FROM_EXTREMES)
def test_batches_of_any_size(method: str) -> None:
    data = laplace(24, 5, 3)
    found = []
    for size in (1, 5, 24):
        batches = [data[i : i + size] for i in range(0, 24, size)]
        stats = Statistics({"x": statistics(*batches)})
        found.append(ranges(stats, "x", method, (0, 255), symmetric=False, per_channel=True))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-6)


def test_per_tensor_is_the_widest_channel() -> None:
    data = laplace(8, 20, 4) * np.float32([1, 2, 3, 4])
    stats = Statistics({"x": statistics(*np.split(data, 2))})
    for method in ("minmax", "robust"):
        low, high = ranges(stats, "x", method, (-128, 127), symmetric=True, per_channel=False)
        assert low.shape == high.shape == (1,)
        assert low <= data.min()
        assert high >= data.max()
    low, high = ranges(stats, "x", "minmax", (-128, 127), symmetric=True, per_channel=False)
    assert (low[0], high[0]) == (data.min(), data.max())


def test_tail_bound_known_answer() -> None:
    extremes = np.array([[10.0], [8.0], [6.0], [4.0]], np.float32)
    # β = mean(10, 8, 6) - 4 = 4; 4 + 4 ln(4 · 8)
    np.testing.assert_allclose(tail_bound(extremes, 100), 4 + 4 * math.log(4 * HORIZON), rtol=1e-6)
    np.testing.assert_array_equal(tail_bound(extremes, 2), 10)
    np.testing.assert_array_equal(tail_bound(np.full((4, 1), 3.0, np.float32), 9), 3)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(-5, 5))
def test_robust_covers_what_it_saw_and_does_not_cross_zero(
    seed: int, images: int, shift: float
) -> None:
    data = laplace(images, 6, 4, seed=seed) + np.float32(shift)
    low, high = FROM_EXTREMES["robust"](statistics(data))
    smallest, largest = data.min(axis=(0, 1)), data.max(axis=(0, 1))
    assert np.all(low <= smallest)
    assert np.all(high >= largest)
    assert np.all(low[smallest >= 0] == smallest[smallest >= 0])
    assert np.all(high[largest <= 0] == largest[largest <= 0])


def test_robust_holds_on_unseen_images() -> None:
    """200 channels, 64 images calibrate, 64 unseen ones follow: how many pass the range?

    The next 64 maxima pass the largest of 64 seen in half of all cases; the robust range,
    which one image in 512 is to pass, in one of eight.
    """
    rng = np.random.default_rng(0)
    seen, unseen = rng.exponential(1, (2, 64, 50, 200)).astype(np.float32)
    stats = statistics(*np.split(seen, 8))
    passed = {
        name: np.mean(unseen.max(axis=(0, 1)) > FROM_EXTREMES[name](stats)[1])
        for name in ("minmax", "robust")
    }
    assert 0.4 < passed["minmax"] < 0.6
    assert passed["robust"] < 0.2
    heavy, more = rng.standard_t(4, (2, 64, 50, 200)).astype(np.float32)
    stats = statistics(*np.split(heavy, 8))
    passed = {
        name: np.mean(more.max(axis=(0, 1)) > FROM_EXTREMES[name](stats)[1])
        for name in ("minmax", "robust")
    }
    assert passed["robust"] < 0.6 * passed["minmax"]


@pytest.mark.parametrize("images", [16, 32, 128])
def test_what_holds_of_robust_on_exponential_tails(images: int) -> None:
    """Passed 1.8 times as often as once in 8 N images, the width of the tail being estimated."""
    rng = np.random.default_rng(images)
    extremes = -np.sort(-rng.exponential(1, (images, 20_000)), axis=0)[:TOP].astype(np.float32)
    passed = np.exp(-tail_bound(extremes, images).astype(np.float64)).mean()
    assert 1.65 < passed * HORIZON * images < 1.95


# --- from histograms --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_percentile_is_numpys_within_a_bin(seed: int) -> None:
    data = np.random.default_rng(seed).standard_t(3, (2, 200_005)).astype(np.float32)
    low, high = FROM_HISTOGRAM["percentile"](histogram(*data), (-128, 127), True)
    width = (data.max(axis=1) - data.min(axis=1)) / BINS
    # 20 of 200,005 values lie outside on either side; the next one is the bound.
    expected = np.quantile(data, 1 - PERCENTILE, axis=1, method="lower")
    assert np.all(np.abs(low - expected) <= width * 1.01)
    expected = np.quantile(data, PERCENTILE, axis=1, method="higher")
    assert np.all(np.abs(high - expected) <= width * 1.01)
    outside = np.mean((data < low[:, None]) | (data > high[:, None]), axis=1)
    assert np.all(outside <= 2 * (1 - PERCENTILE))


def test_percentile_leaves_the_outliers_out() -> None:
    values = np.concatenate([np.linspace(0, 1, 100_000), [1000.0] * 5, [-500.0] * 5])
    low, high = FROM_HISTOGRAM["percentile"](histogram(values), (0, 255), False)
    assert -1 < low[0] <= 0
    assert 1 <= high[0] < 2
    few = np.linspace(-1, 1, 100)
    low, high = FROM_HISTOGRAM["percentile"](histogram(few), (0, 255), False)
    np.testing.assert_allclose((low[0], high[0]), (-1, 1), atol=2 / BINS * 1.01)


def true_error(x: Array, low: float, high: float, limits: tuple[int, int]) -> float:
    """Σ (x - Q(x))² of the values themselves."""
    smallest, largest = limits
    if smallest < 0:
        scale, zero = max(-low / -smallest, high / largest), 0
    else:
        low, high = min(low, 0), max(high, 0)
        scale = (high - low) / (largest - smallest)
        zero = round(smallest - low / scale)
    codes = np.clip(np.rint(x / scale) + zero, smallest, largest)
    return float((((codes - zero) * scale - x.astype(np.float64)) ** 2).sum())


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("method", ["omse", "mse"])
@pytest.mark.parametrize("kind", ["laplace", "outlier", "positive", "uniform", "far"])
def test_searches_are_no_worse_than_minmax(method: str, kind: str, limits: tuple[int, int]) -> None:
    """On the histogram exactly; on the values themselves within what bins can tell."""
    x = laplace(20_000)
    if kind == "outlier":
        x[7] = 60
    elif kind == "positive":
        x = np.abs(x)
    elif kind == "uniform":
        x = np.random.default_rng(1).uniform(-1, 1, 20_000).astype(np.float32)
    elif kind == "far":
        x = x + np.float32(30)
    counts = histogram(x)
    low, high = FROM_HISTOGRAM[method](counts, limits, limits[0] < 0)
    found, plain = (
        error_of(*counts.finest, np.float64([a]), np.float64([b]), limits, limits[0] < 0)[0]
        for a, b in ((low[0], high[0]), (counts.low[0], counts.high[0]))
    )
    assert found <= plain * (1 + 1e-6)
    mine = true_error(x, float(low[0]), float(high[0]), limits)
    theirs = true_error(x, float(x.min()), float(x.max()), limits)
    assert mine <= theirs * 1.02
    if kind == "outlier" and limits[1] - limits[0] < 16:
        assert mine < 0.35 * theirs


def heavy(kind: str) -> Array:
    """A hundred thousand values, of which the largest stretch the range."""
    random = np.random.default_rng(0)
    x = random.normal(size=100_000)
    if kind == "one":  # bins of a 2048th of the range are ten times the step that would be best
        x = np.append(x, 570)
    elif kind == "relu":
        x = np.append(np.maximum(x, 0), 300)
    elif kind == "two groups":
        x = np.append(x, random.normal(200, 50, 100))
    elif kind == "t":
        x = random.standard_t(1.5, 100_000)
    return x.astype(np.float32)


@pytest.mark.parametrize("limits", [(-128, 127), (0, 255), (-8, 7)])
@pytest.mark.parametrize("method", ["omse", "mse"])
@pytest.mark.parametrize("kind", ["one", "relu", "two groups", "t", "normal"])
def test_searches_are_the_best_there_is(method: str, kind: str, limits: tuple[int, int]) -> None:
    """Within 2 % of a search on the values themselves."""
    x = heavy(kind)
    counts = histogram(x)
    low, high = FROM_HISTOGRAM[method](counts, limits, limits[0] < 0)
    mine = true_error(x, float(low[0]), float(high[0]), limits)
    ends = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    best = min(
        true_error(x, ends[0] * share, ends[1] * share, limits)
        for share in np.geomspace(4e-3, 1, 60)
    )
    assert mine <= best * 1.02
    if kind == "one" and limits == (0, 255):
        assert mine / len(x) < 0.39


def test_finest_bins_hold_every_value_once() -> None:
    rows = np.stack([heavy("t"), heavy("two groups")[:100_000]])
    counts = histogram(*rows)
    edges, found = counts.finest
    assert np.all(np.diff(edges) > 0)
    np.testing.assert_array_equal(found.sum(axis=1), 100_000)
    np.testing.assert_array_equal(counts.counts.sum(axis=1), 100_000)
    width = np.diff(edges).min(axis=1)
    assert np.all(width < (counts.high - counts.low) / BINS / 400)
    for row in range(2):
        exact = np.histogram(rows[row].astype(np.float64), edges[row])[0]
        assert np.abs(np.cumsum(exact) - np.cumsum(found[row])).max() <= 60


def test_mse_searches_the_bounds_apart() -> None:
    """An outlier above is clipped, the bulk below is kept: omse, which shrinks both, cannot."""
    x = np.concatenate([np.random.default_rng(0).uniform(-1, 0.2, 20_000), [8.0]])
    counts, limits = histogram(x), (0, 15)
    error = {}
    for method in ("omse", "mse"):
        low, high = FROM_HISTOGRAM[method](counts, limits, False)
        error[method] = true_error(x.astype(np.float32), float(low[0]), float(high[0]), limits)
    assert error["mse"] < 0.7 * error["omse"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_squared_error_is_that_of_the_quantizer(symmetric: bool) -> None:
    limits = (-8, 7) if symmetric else (0, 15)
    counts = histogram(laplace(500), laplace(500, seed=1) * 4)
    low, high = counts.low * 0.6, counts.high * 0.7
    found = error_of(*counts.finest, low, high, limits, symmetric)
    edges, finest = counts.finest
    for row in range(2):
        values = np.repeat((edges[row, 1:] + edges[row, :-1]) / 2, finest[row])
        assert len(values) == 500
        expected = true_error(values, float(low[row]), float(high[row]), limits)
        assert found[row] == pytest.approx(expected, rel=1e-4)


# --- KL ---------------------------------------------------------------------------------------


def slow_divergence(values: Array, counts: Array, low: float, high: float, levels: int) -> float:
    """D(P‖Q) of one histogram, bin by bin, from Migacz's text."""
    inside = [i for i, v in enumerate(values) if low <= v <= high]
    p = {i: float(counts[i]) for i in inside}
    p[inside[0]] += sum(float(c) for v, c in zip(values, counts, strict=True) if v < low)
    p[inside[-1]] += sum(float(c) for v, c in zip(values, counts, strict=True) if v > high)
    groups: dict[int, list[int]] = {}
    for i in inside:
        level = min(int((values[i] - low) / (high - low) * levels), levels - 1)
        groups.setdefault(level, []).append(i)
    q = dict.fromkeys(inside, 0.0)
    for bins in groups.values():
        occupied = [i for i in bins if counts[i] > 0]
        for i in occupied:
            q[i] = sum(float(counts[j]) for j in bins) / len(occupied)
    total_p, total_q = sum(p.values()), max(sum(q.values()), 1e-30)
    loss = 0.0
    for i in inside:
        if p[i] > 0:
            loss += p[i] / total_p * math.log(p[i] / total_p / max(q[i] / total_q, 1e-12))
    return loss


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(8, 60),
    st.sampled_from([2, 4, 16]),
    st.floats(0.15, 1.2),
)
def test_kl_divergence_is_the_slow_one(seed: int, bins: int, levels: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    values = np.stack([np.linspace(-1, 2, bins), np.linspace(-3, 3, bins)])
    counts = rng.poisson(rng.exponential(3, (2, bins))).astype(np.float64)
    counts[:, bins // 2] += 1
    low, high = values[:, 0] * share - 0.01, values[:, -1] * share + 0.01
    found = divergence(values, counts, low, high, levels)
    for row in range(2):
        expected = slow_divergence(values[row], counts[row], low[row], high[row], levels)
        assert found[row] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("levels", [2, 4, 16])
def test_a_value_at_the_edge_is_in_the_last_level(levels: int) -> None:
    """Of its own row, whatever the next one holds."""
    values = np.stack([np.linspace(-1, 2, 30), np.linspace(-3, 3, 30), np.linspace(0, 1, 30)])
    counts = np.random.default_rng(levels).poisson(4, (3, 30)).astype(np.float64) + 1
    found = divergence(values, counts, values[:, 0], values[:, -1], levels)
    for row in range(3):
        ends = float(values[row, 0]), float(values[row, -1])
        expected = slow_divergence(values[row], counts[row], *ends, levels)
        assert found[row] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_kl_takes_the_least_of_its_candidates() -> None:
    """Against a loop over all candidates with the slow divergence."""
    counts = histogram(laplace(3000) * np.float32(2))
    small = Histogram(counts.low, counts.high, counts.counts.reshape(1, 64, -1).sum(axis=2))
    width = (small.high - small.low) / 64
    values = small.low[0] + width[0] * (np.arange(64) + 0.5)
    reach = max(-small.low[0], small.high[0])
    losses = {
        share: slow_divergence(values, small.counts[0], -reach * share, reach * share, 16)
        for share in np.linspace(1.0, 0.1, 46)
    }
    best = min(losses, key=lambda share: losses[share])

    class Coarse(Histogram):
        @property
        def centres(self) -> NDArray[np.float64]:
            return values[None]

    low, high = FROM_HISTOGRAM["kl"](Coarse(small.low, small.high, small.counts), (-8, 7), True)
    np.testing.assert_allclose((low[0], high[0]), (-reach * best, reach * best), rtol=1e-6)


def test_kl_clips_what_is_rare() -> None:
    x = np.concatenate([laplace(100_000), [200.0]]).astype(np.float32)
    low, high = FROM_HISTOGRAM["kl"](histogram(x), (-128, 127), True)
    assert high[0] == -low[0]
    assert 5 < high[0] < 60
    even = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    low, high = FROM_HISTOGRAM["kl"](histogram(even), (-128, 127), True)
    assert high[0] == pytest.approx(1, abs=0.05)


def test_kl_of_one_side() -> None:
    """Asymmetric codes keep zero as the lower bound of what is never negative."""
    low, high = FROM_HISTOGRAM["kl"](histogram(np.abs(laplace(10_000))), (0, 255), False)
    assert low[0] == 0
    assert high[0] > 3


def test_kept_extremes_are_enough_for_the_tail() -> None:
    assert len(statistics(laplace(40, 3, 2)).highest) == TOP
