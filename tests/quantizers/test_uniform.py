"""Uniform quantization: the properties that every scale must keep, and known answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from ptq_onnx.numerics.codes.code import TINY
from ptq_onnx.numerics.codes.uniform import asymmetric_scale, symmetric_scale
from ptq_onnx.numerics.fake_quantize import dequantize, quantize
from ptq_onnx.numerics.grain import PowersOfTwo, along
from ptq_onnx.numerics.spec import Rule, TensorSpec

Array = NDArray[np.float32]
HUGE = 2e38
"""A range from -HUGE to HUGE is wider than the largest float32."""


def arrays(limit: float) -> st.SearchStrategy[Array]:
    """Matrices of finite float32, zeros, tiny and large values among them."""
    values = st.floats(-limit, limit, width=32, allow_nan=False)
    return npst.arrays(np.float32, npst.array_shapes(min_dims=2, max_dims=2), elements=values)


RULES = st.builds(
    lambda bits, kind: Rule(bits, signed=kind != "asymmetric", symmetric=kind != "asymmetric"),
    st.integers(2, 8),
    st.sampled_from(["symmetric", "asymmetric"]),
)


def spec_of(x: Array, rule: Rule, axis: int | None = None) -> TensorSpec:
    """The spec that covers ``x``, for all or per slice along ``axis``."""
    others = None if axis is None else tuple(a for a in range(x.ndim) if a != axis)
    low, high = np.asarray(x.min(axis=others)), np.asarray(x.max(axis=others))
    if rule.symmetric:
        scale = symmetric_scale(low, high, rule.limits)
        zero = np.zeros(low.shape, np.int32)
    else:
        scale, zero = asymmetric_scale(low, high, rule.limits)
    return TensorSpec("x", rule, np.asarray(scale), np.asarray(zero), axis=axis)


@given(arrays(1e6), RULES, st.sampled_from([None, 0, 1]))
def test_error_is_at_most_half_a_step(x: Array, rule: Rule, axis: int | None) -> None:
    spec = spec_of(x, rule, axis)
    codes = quantize(x, spec)
    low, high = rule.limits
    assert codes.dtype == np.int32
    assert codes.shape == x.shape
    assert codes.min() >= low
    assert codes.max() <= high
    error = np.abs(dequantize(codes, spec).astype(np.float64) - x)
    step = along(spec.scale, axis, x.ndim).astype(np.float64)
    # An asymmetric range ends up to half a step beside the rounded zero point.
    reach = 0.5 if rule.symmetric else 1.0
    fuzz = 1e-6 * (1 << rule.bits) * step
    assert np.all(error <= reach * step + fuzz)
    inside = (codes > low) & (codes < high)
    assert np.all(error[inside] <= (0.5 * step + fuzz + np.zeros_like(error))[inside])


@given(arrays(1e6), RULES, st.sampled_from([None, 0, 1]))
def test_second_pass_changes_nothing(x: Array, rule: Rule, axis: int | None) -> None:
    spec = spec_of(x, rule, axis)
    codes = quantize(x, spec)
    values = dequantize(codes, spec)
    np.testing.assert_array_equal(quantize(values, spec), codes)
    np.testing.assert_array_equal(dequantize(quantize(values, spec), spec), values)


@given(arrays(1e6), RULES)
def test_zero_is_exact_and_order_is_kept(x: Array, rule: Rule) -> None:
    spec = spec_of(x, rule)
    zero = np.zeros(1, np.float32)
    np.testing.assert_array_equal(dequantize(quantize(zero, spec), spec), zero)
    assert np.all(np.diff(quantize(np.sort(x.ravel()), spec)) >= 0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "x",
    [
        np.zeros((3, 4)),
        np.full((3, 4), 5.0),
        np.full((3, 4), -5.0),
        np.full((3, 4), 1e-42),
        np.array([[-HUGE, HUGE]]),
        np.array([[0.0, HUGE]]),
        np.array([[-1e-30, 1e30]]),
    ],
    ids=["zeros", "constant", "negative", "denormal", "huge", "huge above", "both"],
)
def test_extremes_stay_finite(x: Array, bits: int, symmetric: bool) -> None:
    rule = Rule(bits, signed=symmetric, symmetric=symmetric)
    x = x.astype(np.float32)
    spec = spec_of(x, rule)
    assert np.isfinite(spec.scale)
    assert spec.scale >= TINY
    found = dequantize(quantize(x, spec), spec)
    assert np.isfinite(found).all()
    if symmetric:
        worst = np.abs(found.astype(np.float64) - x).max()
        assert worst <= 0.5001 * spec.scale.astype(np.float64)


def test_empty_tensor() -> None:
    x = np.zeros((0, 4), np.float32)
    spec = TensorSpec("x", Rule(), np.float32(1).reshape(()), np.array(0, np.int32))
    assert quantize(x, spec).shape == dequantize(quantize(x, spec), spec).shape == (0, 4)


def test_half_goes_to_even() -> None:
    spec = TensorSpec("x", Rule(), np.array(0.25, np.float32), np.array(0, np.int32))
    x = np.array([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5], np.float32) * np.float32(0.25)
    np.testing.assert_array_equal(quantize(x, spec), [0, 2, 2, 4, 0, -2, -2])
    # The zero point is added behind the rounding: an odd one must not change the ties.
    rule = Rule(signed=False, symmetric=False)
    shifted = TensorSpec("x", rule, np.array(0.25, np.float32), np.array(7, np.int32))
    np.testing.assert_array_equal(quantize(x, shifted), np.array([0, 2, 2, 4, 0, -2, -2]) + 7)


def test_known_answers() -> None:
    low, high = np.array([-2.0, 0, -1], np.float32), np.array([1.0, 254, 3], np.float32)
    np.testing.assert_allclose(
        symmetric_scale(low, high, (-128, 127)), [2 / 128, 2, 3 / 127], rtol=1e-7
    )
    scale, zero = asymmetric_scale(low, high, (0, 255))
    np.testing.assert_allclose(scale, [3 / 255, 254 / 255, 4 / 255], rtol=1e-7)
    np.testing.assert_array_equal(zero, [170, 0, 64])
    scale, zero = asymmetric_scale(np.float32([2.0]), np.float32([4.0]), (0, 15))
    np.testing.assert_allclose(scale, 4 / 15, rtol=1e-7)
    np.testing.assert_array_equal(zero, 0)


@given(arrays(1e4))
def test_per_axis_is_each_slice_alone(x: Array) -> None:
    rule = Rule()
    spec = spec_of(x, rule, axis=1)
    codes = quantize(x, spec)
    for column in range(x.shape[1]):
        alone = x[:, column : column + 1]
        np.testing.assert_array_equal(
            codes[:, column : column + 1], quantize(alone, spec_of(alone, rule))
        )


@settings(max_examples=50)
@given(arrays(1e4), st.lists(st.integers(0, 7), min_size=1, max_size=10))
def test_a_power_of_two_factor_is_exact(x: Array, alpha: list[int]) -> None:
    """x / 2^α / s has the bits of x / (2^α s)."""
    factor = np.exp2(np.resize(np.array(alpha, np.float32), x.shape[1]))
    rule = Rule(grain=PowersOfTwo())
    scale = np.array(max(float(np.abs(x).max()), 1.0) / 127, np.float32)
    spec = TensorSpec("x", rule, scale, np.array(0, np.int32), factor=factor)
    direct = np.clip(np.rint(x / (scale * factor)), -128, 127)
    np.testing.assert_array_equal(quantize(x, spec), direct)
    np.testing.assert_array_equal(dequantize(quantize(x, spec), spec), direct * (scale * factor))
