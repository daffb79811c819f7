"""Factors per channel by weighted squared error: what they clip, and that the noise is right."""

import numpy as np
import pytest

from ptq_onnx.numerics.ptf import Factors, searched_factors

LIMITS = (0, 255)


def dequantized(rows: np.ndarray, found: Factors, limits: tuple[int, int] = LIMITS) -> np.ndarray:
    step = found.scale * 2.0**found.alpha
    codes = np.clip(np.rint(rows / step) + found.zero_point, *limits)
    return (codes - found.zero_point) * step


def normal(*sigma: float, rows: int = 400) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, len(sigma))) * np.array(sigma)


@pytest.mark.parametrize("max_k", [None, 2, 0])
def test_the_noise_is_that_of_the_codes(max_k: int | None) -> None:
    rows = normal(1, 3, 100, 0.01, 40)
    power = np.linspace(0.5, 2, len(rows)) / len(rows)
    found, noise = searched_factors(rows, power, LIMITS, max_k)
    assert found.alpha.min() == 0
    assert found.alpha.max() <= (12 if max_k is None else max_k)
    seen = power @ (rows - dequantized(rows, found)) ** 2
    if max_k is None:
        np.testing.assert_allclose(noise, seen, rtol=1e-9)
    assert found.noise == pytest.approx(noise.sum())


def test_channels_have_steps_of_their_own() -> None:
    rows = normal(1, 100)
    found, noise = searched_factors(rows, np.full(400, 1 / 400), LIMITS)
    assert found.alpha[1] - found.alpha[0] in (6, 7)
    assert noise[0] < noise[1] / 1000


def test_few_rows_are_clipped_where_all_others_gain() -> None:
    """One row of 400 is 60 times as large: most levels would be for it alone."""
    rows = normal(1, 1)
    rows[0] = 60
    even, unlike = np.full(400, 1 / 400), np.full(400, 1 / 400)
    unlike[0] /= 60**2  # as by the variance of its row
    kept, _ = searched_factors(rows, even, LIMITS)
    clipped, _ = searched_factors(rows, unlike, LIMITS)
    reach = [f.scale * 2.0 ** f.alpha.max() * 255 for f in (kept, clipped)]
    assert reach[0] > 60
    assert reach[1] < reach[0] / 4


def test_a_channel_of_zeros_has_no_noise() -> None:
    rows = normal(1, 0)
    found, noise = searched_factors(rows, np.full(400, 1 / 400), LIMITS)
    assert noise[1] == 0
    assert np.isfinite(found.scale)
    assert np.all(dequantized(rows, found)[:, 1] == 0)


def test_what_the_channels_share_follows_those_that_count() -> None:
    """One channel is all negative and large: its best zero point leaves the others few codes."""
    rows = normal(1, 1, 1, 1)
    rows[:, 0] = -1000 + 100 * rows[:, 0]
    even = np.full(400, 1 / 400)
    alike, _ = searched_factors(rows, even, LIMITS)
    weighed, noise = searched_factors(rows, even, LIMITS, counts=np.array([1e-9, 1, 1, 1]))
    assert alike.zero_point > 200
    assert 100 < weighed.zero_point < 156
    assert weighed.noise == pytest.approx(float(noise @ [1e-9, 1, 1, 1]))
