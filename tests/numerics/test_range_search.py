"""Ranges of few levels: no candidate is better than what is found, and extremes are clipped."""

from __future__ import annotations

import numpy as np

from ptq_onnx.numerics.codes.code import Numbers
from ptq_onnx.numerics.codes.logarithmic import Logarithmic
from ptq_onnx.numerics.range_search import channel_bounds, logarithmic_range, rates, share_rate


def error(x: np.ndarray, low: float, high: float, levels: int) -> float:
    step = (high - low) / (levels - 1)
    return float(np.sum((np.clip(np.rint((x - low) / step), 0, levels - 1) * step + low - x) ** 2))


def test_even_values_are_covered() -> None:
    """16 values in equal numbers are the 16 levels."""
    rows = np.repeat(np.arange(16, dtype=np.float32), 10)[:, None] * np.array([[1.0, 0.5]]) + 3
    low, high = channel_bounds(rows.astype(np.float32), 16)
    np.testing.assert_allclose(low, [3, 3], atol=1e-5)
    np.testing.assert_allclose(high, [18, 10.5], atol=1e-5)


def test_each_end_of_each_channel_by_itself() -> None:
    """One far value above in one channel, below in the other: that end alone comes in."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(4000, 20)).astype(np.float32)
    rows[0, 0], rows[0, 17] = 14, -14
    low, high = channel_bounds(rows, 16)
    assert high[0] < 6
    assert low[0] < -1.8
    assert low[17] > -6
    assert high[17] > 1.8
    for c in range(20):
        x = rows[:, c].astype(np.float64)
        assert error(x, low[c], high[c], 16) < 0.9 * error(x, x.min(), x.max(), 16)


def test_a_constant_and_an_empty_channel_stay_finite() -> None:
    rows = np.stack([np.full(50, 7.0), np.zeros(50)], axis=1).astype(np.float32)
    low, high = channel_bounds(rows, 16)
    np.testing.assert_allclose(low, [7, 0], atol=1e-5)
    np.testing.assert_allclose(high, [7, 0], atol=1e-5)


def noise(x: np.ndarray, scale: float, zero: int, eighths: int, bits: int) -> float:
    held = Numbers(bits, False, np.float32(scale), np.array(zero), {"eighths": eighths})
    code = Logarithmic()
    return float(np.mean((code.values(code.codes(x, held), held) - x) ** 2, dtype=np.float64))


def test_the_logarithmic_range_is_better_than_its_neighbours() -> None:
    random = np.random.default_rng(1)
    x = np.maximum(random.normal(size=8000) * 2, -0.17).astype(np.float32)
    found = logarithmic_range(x, np.ones(len(x)), 4)
    scale, zero = float(found.scale[0]), int(found.zero_point[0])
    eighths = found.details["eighths"]
    best = noise(x, scale, zero, eighths, 4)
    for other in (scale * 1.3, scale / 1.3):
        assert noise(x, other, zero, eighths, 4) > best
    for rate in rates(4):
        assert noise(x, scale, zero, rate, 4) >= best * 0.999


def test_values_that_count_nothing_are_not_covered() -> None:
    x = np.concatenate([np.linspace(0, 1, 1000), np.full(10, 50.0)]).astype(np.float32)
    weight = np.ones(len(x))
    weight[1000:] = 0
    found = logarithmic_range(x, weight, 4)
    assert float(found.scale[0]) < 6  # the least part of the largest that is tried: a tenth
    assert int(found.zero_point[0]) == 15


def test_flat_maps_get_fine_codes_and_peaked_ones_reach_far() -> None:
    random = np.random.default_rng(2)
    found = []
    for spread in (0.2, 2.0, 6.0):
        logits = random.normal(size=(4, 32, 64)) * spread
        attention = np.exp(logits)
        attention = (attention / attention.sum(axis=-1, keepdims=True)).astype(np.float32)
        found.append(share_rate(attention, random.normal(size=(4, 64, 16)).astype(np.float32), 4))
    assert found[0] == max(rates(4))
    assert found[0] > max(found[1:])
