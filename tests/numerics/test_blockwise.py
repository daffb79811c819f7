"""Known answers of the grids of blocks: scales, zero points and what weighs."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_onnx.numerics.blockwise import block_grid


def column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def test_a_ramp_is_held_exactly() -> None:
    """0 … 15 in 16 codes: the step is 1 and zero is code 0; below zero, code 15."""
    ramp = np.arange(16, dtype=np.float32)
    weight = np.stack([ramp, -ramp, ramp - 6, 3 * ramp], axis=1)
    scale, zero = block_grid(weight, 4, size=16)
    np.testing.assert_array_equal(scale, [[1, 1, 1, 3]])
    np.testing.assert_array_equal(zero, [[0, 15, 6, 0]])


def test_ranges_hold_zero() -> None:
    """10 … 15 is coded from 0 on, -15 … -10 up to 0."""
    ramp = np.arange(10, 16, dtype=np.float32)
    scale, zero = block_grid(np.stack([ramp, -ramp], axis=1), 4, size=6)
    np.testing.assert_array_equal(scale, [[1, 1]])
    np.testing.assert_array_equal(zero, [[0, 15]])


def test_blocks_are_of_32_rows_and_the_last_has_the_rest() -> None:
    ramp = np.arange(16, dtype=np.float32)
    weight = np.concatenate([ramp, ramp, 2 * ramp, 2 * ramp, 4 * ramp])[:, None]
    scale, zero = block_grid(weight, 4)
    np.testing.assert_array_equal(scale, [[1], [2], [4]])
    np.testing.assert_array_equal(zero, [[0], [0], [0]])


def test_columns_are_apart() -> None:
    ramp = np.arange(16, dtype=np.float32)
    scale, _ = block_grid(ramp[:, None] * np.float32([1, 2, 5]), 4, size=8)
    np.testing.assert_allclose(scale[1], [1, 2, 5])
    np.testing.assert_allclose(scale[0] * 15, [7, 14, 35], rtol=0.1)
    assert scale.shape == (2, 3)


def test_what_no_image_reaches_does_not_weigh() -> None:
    """Of 5.5 and 15 only the first has input: no candidate is exact there, the fitted scale is."""
    scale, zero = block_grid(column(0, 5.5, 15), 4, np.array([1.0, 1.0, 0.0]))
    codes = np.rint(5.5 / scale[0, 0])
    assert codes * float(scale[0, 0]) == pytest.approx(5.5, rel=1e-6)
    assert (zero, codes) == (0, 6)
    heavy, _ = block_grid(column(0, 5.5, 15), 4, np.array([1.0, 1.0, 1e6]))
    assert np.rint(15 / heavy[0, 0]) * float(heavy[0, 0]) == pytest.approx(15, abs=1e-4)


def test_the_fit_is_the_least_squares_one() -> None:
    """Σ p w c / Σ p c² with the codes that it leads to, and better than 200 ranges."""
    random = np.random.default_rng(3)
    weight = random.normal(size=(32, 40)).astype(np.float32)
    power = random.uniform(0.1, 4, 32)
    scale, zero = (v.astype(float) for v in block_grid(weight, 4, power))
    codes = np.clip(np.rint(weight / scale) + zero, 0, 15) - zero
    fitted = (power[:, None] * weight * codes).sum(0) / (power[:, None] * codes**2).sum(0)
    assert np.abs(fitted / scale[0] - 1).max() < 0.01
    assert np.median(np.abs(fitted / scale[0] - 1)) < 1e-6
    error = (power[:, None] * (codes * scale - weight) ** 2).sum()
    low, high = weight.min(0), weight.max(0)
    candidates = []
    for share in np.linspace(0.3, 1, 200):
        step = (high - low) * share / 15
        point = np.clip(np.rint(-low * share / step), 0, 15)
        held = np.clip(np.rint(weight / step) + point, 0, 15) - point
        candidates.append((power[:, None] * (held * step - weight) ** 2).sum(0))
    assert error < np.min(candidates, axis=0).sum()


@pytest.mark.parametrize("power", [np.zeros(4), np.full(4, -1.0)])
def test_without_input_all_rows_are_alike(power: np.ndarray) -> None:
    weight = column(0.1, -0.7, 0.35, 1.0)
    for found, expected in zip(
        block_grid(weight, 4, power), block_grid(weight, 4, np.ones(4)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_a_small_power_still_weighs() -> None:
    """1e-3 of each is what 1 of each is; a block without any does not take its neighbour's."""
    weight = column(0, 5.5, 15, 0, 5.5, 15)
    power = np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    scale, _ = block_grid(weight, 4, 1e-3 * power, size=3)
    one, _ = block_grid(weight, 4, power, size=3)
    np.testing.assert_allclose(scale, one, rtol=1e-6)
    alike, _ = block_grid(column(0, 5.5, 15), 4)
    np.testing.assert_array_equal(one[1], alike[0])


def test_nothing_at_all_stays_finite() -> None:
    scale, zero = block_grid(np.zeros((5, 2), np.float32), 4, size=4)
    assert (scale > 0).all()
    assert scale.max() < 1e-6
    np.testing.assert_array_equal(zero, 0)
