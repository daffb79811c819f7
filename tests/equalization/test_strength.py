"""The noise model against simulated rounding, and what the search makes of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_onnx.equalization.factor_search import (
    Product,
    balance,
    choose_factor,
    normalized,
    output_noise,
    spend,
)


def layer(seed: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Uniform inputs [4096, 24] whose channels differ by ``spread``, and weights [24, 32]."""
    random = np.random.default_rng(seed)
    ranges = np.exp(random.normal(0, spread, 24))
    x = random.uniform(-1, 1, (4096, 24)) * ranges
    return x, random.normal(0, 0.1, (24, 32))


def rounded(value: np.ndarray, step: np.ndarray | float) -> np.ndarray:
    return np.rint(value / step) * step


@pytest.mark.parametrize("spread", [0.0, 0.7, 1.5])
def test_expected_noise_is_that_of_rounding(spread: float) -> None:
    """Within 10 % of the noise of x̂ Ŵ at 8 bits, for the factor chosen and for none."""
    x, weight = layer(1, spread)
    half, variance = np.abs(x).max(axis=0), x.var(axis=0)
    product = Product(np.abs(weight).astype(np.float32))
    choice = choose_factor(half, variance, [product], 256)
    for factor, expected in ((np.ones(24), choice.plain), (choice.factor, choice.noise)):
        step = 2 * (half / factor).max() / 255
        scaled = weight * factor[:, None]
        codes = rounded(scaled, np.abs(scaled).max(axis=0) / 127)
        error = rounded(x / factor, step) @ codes - x @ weight
        found = float((error**2).sum() / len(x))
        assert found == pytest.approx(expected, rel=0.1)


def test_wide_channels_are_worth_a_factor() -> None:
    x, weight = layer(2, 1.5)
    half, variance = np.abs(x).max(axis=0), x.var(axis=0)
    choice = choose_factor(half, variance, [Product(np.abs(weight).astype(np.float32))], 256)
    assert choice.gain_db > 3
    assert np.log(choice.factor).mean() == pytest.approx(0, abs=1e-9)
    assert np.corrcoef(np.log(choice.factor), np.log(half))[0, 1] > 0.8


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999, 1.001, 10.0])
def test_a_limit_saves_work_and_changes_no_choice(share: float) -> None:
    """Below the limit the noise is exact; at or beyond it, at least the limit."""
    x, weight = layer(3, 1.0)
    half, variance = np.abs(x).max(axis=0), x.var(axis=0)
    products = [Product(np.abs(weight).astype(np.float32)) for _ in range(3)]
    exact = output_noise(np.ones(24), half, variance, products, 256)
    found = output_noise(np.ones(24), half, variance, products, 256, limit=share * exact)
    if share > 1:
        assert found == exact
    else:
        assert share * exact <= found <= exact


def test_equal_channels_need_none() -> None:
    product = Product(np.full((8, 5), 0.3, np.float32))
    choice = choose_factor(np.ones(8), np.ones(8), [product], 256)
    assert choice.gain_db == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(choice.factor, 1)


def test_one_outlier_is_split() -> None:
    """A channel 30 times the others: copies take its range down to theirs."""
    half = np.ones(64)
    half[7] = 30.0
    weight = np.random.default_rng(0).normal(0, 1, (64, 16)).astype(np.float32)
    plain = choose_factor(half, half**2 / 3, [Product(np.abs(weight))], 256)
    split = choose_factor(half, half**2 / 3, [Product(np.abs(weight))], 256, extra=(16, 32))
    assert split.copies is not None
    assert split.copies[7] == split.copies.max() >= 16
    assert split.copies.sum() - 64 in (16, 32)
    assert split.gain_db > plain.gain_db + 2


@settings(max_examples=60)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=40), st.integers(min_value=1, max_value=64)
)
def test_copies_are_spent_where_they_are_needed(ranges: list[float], extra: int) -> None:
    """All are spent, and no other split would leave a narrower widest part by much."""
    values = np.array(ranges)
    copies = spend(values, extra)
    assert copies.min() >= 1
    assert copies.sum() - len(values) == extra
    widest = (values / copies).max()
    smaller = np.ceil(values / (widest * 0.999)).clip(1).sum() - len(values)
    assert smaller > extra - 1


def test_noise_of_copies_is_that_of_equal_parts() -> None:
    """Two copies of a channel: the same step as twice the factor, the weights' rows as before."""
    half, variance = np.array([4.0, 1.0]), np.array([1.0, 1.0])
    weight = np.array([[1.0, 0.5], [0.5, 1.0]], np.float32)
    copies = np.array([4, 1])
    noise = output_noise(np.ones(2), half, variance, [Product(weight)], 256, copies=copies)
    step, rows = 2 * 1.0 / 255, (weight.astype(float) ** 2).sum(axis=1)
    expected = step**2 * (16 * rows[0] + rows[1]) + 2 * (1 / 127) ** 2 * 2
    assert noise == pytest.approx(expected / 12)


def test_balance_takes_from_the_wider() -> None:
    """q with ranges 1 and 16 against k with 16 and 1: f evens both out."""
    q, k = np.array([1.0, 16.0]), np.array([16.0, 1.0])
    choice = balance(q, k, q**2 / 3, k**2 / 3, 256)
    assert choice.factor[1] / choice.factor[0] == pytest.approx(16, rel=0.5)
    assert choice.gain_db > 5
    same = balance(q, q, q**2 / 3, q**2 / 3, 256)
    np.testing.assert_allclose(same.factor, 1)


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=20))
def test_factors_stay_finite(values: list[float]) -> None:
    factor = normalized(np.array(values))
    assert np.isfinite(factor).all()
    assert factor.max() / factor.min() <= 2.0**12 * 1.001
