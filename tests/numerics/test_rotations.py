"""Rotations that keep the mean: orthogonal, R·1 = 1, and as flat as they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq_onnx.numerics.rotations import flattened, hadamard, spreading

KNOWN = (1, 2, 4, 12, 20, 36, 48, 64, 96, 192, 384, 768, 1152, 1280, 1408, 1664)


@pytest.mark.parametrize("width", KNOWN)
def test_hadamard(width: int) -> None:
    found = hadamard(width)
    assert found is not None
    assert np.array_equal(np.abs(found), np.ones((width, width)))
    assert np.array_equal(found @ found.T, width * np.eye(width))
    assert np.array_equal(found[:, 0], np.ones(width))


@pytest.mark.parametrize("width", [3, 6, 7, 90, 100])
def test_widths_without_one(width: int) -> None:
    assert hadamard(width) is None


@given(st.sampled_from([2, 3, 7, 12, 16, 24, 90, 96]), st.integers(0, 9))
def test_orthogonal_and_keeps_the_mean(width: int, seed: int) -> None:
    direction = np.random.default_rng(seed).standard_normal(width)
    spread = spreading(width, seed)
    for matrix in (spread, flattened(spread, direction)):
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-12)
        np.testing.assert_allclose(matrix.sum(axis=1), np.ones(width), atol=1e-12)


@pytest.mark.parametrize("width", [192, 384, 768])
def test_a_single_channel_comes_out_even(width: int) -> None:
    """But for one column in D, entries are ± 1/√D; a random matrix reaches 3.3/√D here."""
    size = np.abs(spreading(width, 0)) * np.sqrt(width)
    assert np.quantile(size, 0.99) < 1.35
    assert np.quantile(size, 0.02) > 0.65
    random, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))
    assert np.quantile(np.abs(random) * np.sqrt(width), 0.99) > 2.5


def test_a_direction_comes_out_flat() -> None:
    """A massive channel among 192: 192 values that differ by less than a third."""
    direction = np.random.default_rng(0).standard_normal(192)
    direction[7] = 100.0
    found = np.abs((direction - direction.mean()) @ flattened(spreading(192, 3), direction))
    assert found.max() < 1.35 * found.min()
    np.testing.assert_allclose((found**2).sum(), ((direction - direction.mean()) ** 2).sum())


def test_nothing_to_flatten() -> None:
    spread = spreading(12, 0)
    assert np.array_equal(flattened(spread, np.full(12, 3.0)), spread)
