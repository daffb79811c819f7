"""Scales of weights: known answers, and what the search below 8 bits gains."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from ptq_onnx.numerics.codes.code import TINY
from ptq_onnx.numerics.grain import along
from ptq_onnx.numerics.weights import weight_scale

Array = NDArray[np.float32]
WEIGHTS = npst.arrays(
    np.float32,
    npst.array_shapes(min_dims=2, max_dims=4, max_side=5),
    elements=st.floats(-100, 100, width=32),
)


def squared_error(weight: Array, scale: Array, axis: int | None, bits: int) -> Array:
    """Σ (w - ŵ)² per slice along ``axis``."""
    step = along(np.asarray(scale, np.float64), axis, weight.ndim)
    top = (1 << (bits - 1)) - 1
    error = (np.clip(np.rint(weight / step), -top - 1, top) * step - weight) ** 2
    others = None if axis is None else tuple(a for a in range(weight.ndim) if a != axis)
    return np.asarray(error.sum(axis=others))


@given(WEIGHTS, st.sampled_from([None, 0, 1, -1]))
def test_eight_bits_cover_the_largest(weight: Array, axis: int | None) -> None:
    scale = weight_scale(weight, axis, 8)
    others = (
        None if axis is None else tuple(a for a in range(weight.ndim) if a != axis % weight.ndim)
    )
    largest = np.abs(weight).max(axis=others)
    assert scale.dtype == np.float32
    assert scale.shape == largest.shape
    np.testing.assert_allclose(scale, np.maximum(largest / 127, TINY), rtol=1e-6)


@example(np.array([[91.933174, 29.671875]], np.float32), None, 6)
@example(np.array([[-8.0, -6.0]], np.float32), None, 5)
@given(WEIGHTS, st.sampled_from([None, 0, 1]), st.integers(2, 7))
def test_the_search_never_loses(weight: Array, axis: int | None, bits: int) -> None:
    """Below 8 bits the error is at most that of the unclipped range, slice by slice."""
    found = weight_scale(weight, axis, bits)
    top = (1 << (bits - 1)) - 1
    others = None if axis is None else tuple(a for a in range(weight.ndim) if a != axis)
    largest = np.abs(weight.astype(np.float64)).max(axis=others)
    full = np.maximum(largest / top, TINY).astype(np.float32)
    assert np.all(found > 0)
    assert np.all(found <= full)
    error, before = (squared_error(weight, s, axis, bits) for s in (found, full))
    assert np.all(error <= before * (1 + 1e-12))


def test_per_channel_is_each_channel_alone() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    for bits in (4, 8):
        for axis in (0, 1):
            together = weight_scale(weight, axis, bits)
            alone = [
                weight_scale(np.take(weight, [i], axis), None, bits)
                for i in range(weight.shape[axis])
            ]
            np.testing.assert_array_equal(together, np.array(alone, np.float32))


def test_an_outlier_is_clipped_at_four_bits_only() -> None:
    weight = np.random.default_rng(1).standard_normal((1, 4096)).astype(np.float32)
    assert weight_scale(weight, None, 8) == np.abs(weight).max() / np.float32(127)
    clipped = weight_scale(weight, None, 4) * 7
    assert clipped < 0.8 * np.abs(weight).max()
    full = np.float32(np.abs(weight).max() / 7)
    gain = squared_error(weight, weight_scale(weight, None, 4), None, 4) / squared_error(
        weight, full, None, 4
    )
    assert gain < 0.8


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 5.0, -1e38, 1e-42])
def test_constant_weights(value: float, bits: int) -> None:
    weight = np.full((3, 4), value, np.float32)
    scale = weight_scale(weight, 1, bits)
    assert np.isfinite(scale).all()
    assert np.all(scale >= TINY)
    top = (1 << (bits - 1)) - 1
    codes = np.clip(np.rint(weight / scale.astype(np.float64)), -top - 1, top)
    np.testing.assert_allclose(codes * scale, weight, rtol=1e-5, atol=0.5 * TINY)


def test_an_empty_weight_has_a_scale() -> None:
    assert weight_scale(np.zeros((0, 3), np.float32), 1, 4).shape == (3,)
    assert weight_scale(np.zeros((0, 3), np.float32), None, 8) == np.float32(TINY)
