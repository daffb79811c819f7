"""Power-of-Two Factor: nothing clips, the bound on K holds, and it never costs anything."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from ptq_onnx.numerics.codes.code import TINY
from ptq_onnx.numerics.codes.uniform import symmetric_scale
from ptq_onnx.numerics.fake_quantize import dequantize, quantize
from ptq_onnx.numerics.grain import PowersOfTwo
from ptq_onnx.numerics.ptf import (
    MAX_K,
    Factors,
    Reader,
    exponents,
    find_factors,
    needed_step,
    output_noise,
    zero_points,
)
from ptq_onnx.numerics.spec import Rule, TensorSpec

Array = NDArray[np.float32]
UINT8 = Rule(8, signed=False, symmetric=False, grain=PowersOfTwo())
INT8 = Rule(8, grain=PowersOfTwo())


@st.composite
def bounds(draw: st.DrawFn) -> tuple[Array, Array]:
    """Lower and upper bounds of 1 to 12 channels, from constant to 10^5 apart."""
    size = draw(st.integers(1, 12))
    value = st.floats(-1000, 1000, width=32)
    ends = draw(npst.arrays(np.float32, (2, size), elements=value))
    spread = draw(npst.arrays(np.float32, size, elements=st.floats(0.0009765625, 128, width=32)))
    return ends.min(axis=0) * spread, ends.max(axis=0) * spread


def spec_of(found: Factors, rule: Rule) -> TensorSpec:
    factor = np.exp2(found.alpha.astype(np.float32))
    return TensorSpec(
        "x", rule, np.array(found.scale, np.float32), np.array(found.zero_point), factor=factor
    )


RULES = pytest.mark.parametrize("rule", [UINT8, INT8], ids=["uint8", "int8"])


@RULES
@given(bounds(), st.sampled_from([None, 0, 1, 3, 12]))
def test_nothing_in_range_clips(rule: Rule, ends: tuple[Array, Array], max_k: int | None) -> None:
    low, high = ends
    found = find_factors(low, high, rule.limits, symmetric=rule.symmetric, max_k=max_k)
    assert found.alpha.dtype == np.int32
    assert found.alpha.min() == 0
    assert found.alpha.max() <= (MAX_K if max_k is None else max_k)
    assert rule.limits[0] <= found.zero_point <= rule.limits[1]
    spec = spec_of(found, rule)
    x = np.concatenate([np.linspace(low, high, 9, dtype=np.float32), 0 * low[None]])
    error = np.abs(dequantize(quantize(x, spec), spec).astype(np.float64) - x)
    step = found.scale * np.exp2(found.alpha.astype(np.float64))
    assert np.all(error <= step * (0.5 + 2e-5))
    assert np.all(error[-1] == 0)


@RULES
@given(bounds())
def test_noise_falls_with_k(rule: Rule, ends: tuple[Array, Array]) -> None:
    """Never worse than per tensor (K = 0), whatever the channels."""
    symmetric = rule.symmetric
    found = [find_factors(*ends, rule.limits, symmetric=symmetric, max_k=k) for k in (0, 3, None)]
    plain, three, free = (one.noise for one in found)
    assert three <= plain
    assert free <= plain
    for one in found:
        step = one.scale * np.exp2(one.alpha.astype(np.float64))
        assert one.noise == pytest.approx(float((step**2).sum()) / 12)


@given(bounds())
def test_k_of_zero_is_per_tensor(ends: tuple[Array, Array]) -> None:
    low, high = ends
    found = find_factors(low, high, INT8.limits, symmetric=True, max_k=0)
    assert not found.alpha.any()
    assert found.scale == pytest.approx(
        float(symmetric_scale(low.min(), high.max(), INT8.limits)), rel=1e-6
    )
    wide = find_factors(low, high, UINT8.limits, max_k=0)
    assert not wide.alpha.any()
    span = max(float(high.max()), 0) - min(float(low.min()), 0)
    # The zero point is a whole number: the wider side, 127 levels or more, loses one at most.
    assert wide.scale <= max(span / 255 * 128 / 127, TINY)


def test_known_answer() -> None:
    """Ranges 1, 2, 4, 8 need exponents 0, 1, 2, 3, and every step is the smallest possible."""
    high = np.array([1, 2, 4, 8], np.float32)
    found = find_factors(-high, high, (-127, 127), symmetric=True)
    np.testing.assert_array_equal(found.alpha, [0, 1, 2, 3])
    assert found.scale == pytest.approx(1 / 127)
    capped = find_factors(-high, high, (-127, 127), symmetric=True, max_k=2)
    np.testing.assert_array_equal(capped.alpha, [0, 0, 1, 2])
    assert capped.scale == pytest.approx(2 / 127)
    # FQ-ViT's own setting, K = 3, is not enough for a channel 1,000 times the others.
    wide = np.array([1, 1, 1, 1000], np.float32)
    three = find_factors(-wide, wide, (-127, 127), symmetric=True, max_k=3)
    free = find_factors(-wide, wide, (-127, 127), symmetric=True)
    np.testing.assert_array_equal(three.alpha, [0, 0, 0, 3])
    np.testing.assert_array_equal(np.unique(free.alpha[:3]), 0)
    assert free.alpha[3] > 3
    steps = [one.scale * 2.0 ** one.alpha[0] for one in (three, free)]
    assert steps[1] < steps[0] / 10


def test_constant_and_empty_channels() -> None:
    zero = np.zeros(4, np.float32)
    for rule in (UINT8, INT8):
        found = find_factors(zero, zero, rule.limits, symmetric=rule.symmetric)
        assert not found.alpha.any()
        assert found.scale == TINY
        spec = spec_of(found, rule)
        np.testing.assert_array_equal(dequantize(quantize(zero[None], spec), spec), 0)
        ends = np.array([0, 0, 3, -2], np.float32)
        found = find_factors(ends, ends, rule.limits, symmetric=rule.symmetric)
        spec = spec_of(found, rule)
        values = dequantize(quantize(ends[None], spec), spec)[0]
        np.testing.assert_allclose(values, ends, atol=3 / 127)
        assert np.isfinite(values).all()


def test_huge_channels_stay_finite() -> None:
    high = np.array([1e-30, 1, 1e38], np.float32)
    found = find_factors(-high, high, UINT8.limits)
    spec = spec_of(found, UINT8)
    assert np.isfinite(found.noise)
    assert np.isfinite(dequantize(quantize(np.stack([-high, high]), spec), spec)).all()
    assert found.alpha.max() <= MAX_K


def test_needed_step_and_zero_points() -> None:
    low, high = np.array([-1.0, 0, -3]), np.array([1.0, 5, 0])
    np.testing.assert_allclose(
        needed_step(low, high, 55, (0, 255)), [max(1 / 200, 1 / 55), 5 / 200, 3 / 55]
    )
    assert zero_points(low, high, (-128, 127), symmetric=True) == [0]
    # Whole tensor: 255 · 3 / 8 = 95.6; the median channel: 127.5; the middle: 128.
    assert zero_points(low, high, (0, 255), symmetric=False) == [95, 96, 127, 128]


def test_a_short_side_keeps_its_levels() -> None:
    """GELU's range: 0.17 of 10 below zero is 4.3 levels, and four of them would not do."""
    low, high = np.array([-0.17], np.float32), np.array([10.0], np.float32)
    found = find_factors(low, high, UINT8.limits)
    assert found.zero_point == 5
    assert found.scale == pytest.approx(10 / 250)


@given(bounds(), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.75]))
def test_exponents_follow_the_steps(
    ends: tuple[Array, Array], strength: float, offset: float
) -> None:
    step = needed_step(ends[0].astype(float), ends[1].astype(float), 128, (0, 255))
    alpha = exponents(step, strength, offset, 5)
    assert alpha.min() == 0
    assert alpha.max() <= 5
    order = np.argsort(step)
    assert np.all(np.diff(alpha[order]) >= 0)
    if strength == 0:
        assert not alpha.any()


@pytest.mark.parametrize("seed", range(3))
def test_output_noise_is_the_measured_noise(seed: int) -> None:
    """Σ_n (x̂ ŵ_n - x w_n)² of really rounded numbers, the mean over 4,000 rows."""
    rng = np.random.default_rng(seed)
    channels, columns = 48, 64
    spread = np.exp2(rng.uniform(-3, 3, channels))
    x = (rng.uniform(-1, 1, (4000, channels)) * spread).astype(np.float32)
    weight = rng.standard_normal((channels, columns)).astype(np.float32) / 8
    reader = Reader.of(weight, (x.astype(np.float64) ** 2).mean(axis=0), bits=6)
    alpha = np.clip(np.floor(np.log2(spread) + 3), 0, None).astype(np.int32)
    factor = np.exp2(alpha.astype(np.float64))
    scale = 2.0**-3 * 2 / 127

    rounded = np.rint(x / (scale * factor)) * scale * factor
    step = np.abs(weight * factor[:, None]).max(axis=0) / 31
    moved = np.rint(weight * factor[:, None] / step) * step
    exact = x.astype(np.float64) @ weight.astype(np.float64)
    measured = (((rounded / factor) @ moved - exact) ** 2).sum(axis=1).mean()
    assert output_noise(scale * factor, alpha, reader) == pytest.approx(measured, rel=0.06)
    alone = ((rounded - x) ** 2).sum(axis=1).mean()
    assert output_noise(scale * factor, alpha, None) == pytest.approx(alone, rel=0.03)
    # Each of the two parts by itself: without it, the other would hide a wrong one.
    fine = Reader(reader.magnitude, reader.row_power, reader.second_moment, bits=24)
    tensor_part = ((rounded @ weight - exact) ** 2).sum(axis=1).mean()
    assert output_noise(scale * factor, alpha, fine) == pytest.approx(tensor_part, rel=0.05)
    weight_part = ((x / factor) @ moved - exact) ** 2
    assert output_noise(0 * factor, alpha, reader) == pytest.approx(
        weight_part.sum(axis=1).mean(), rel=0.06
    )


def test_a_reader_holds_the_factor_back() -> None:
    """Where the weight must swallow the factor, the best compromise is not the steepest."""
    rng = np.random.default_rng(0)
    high = np.exp2(np.linspace(0, 9, 64)).astype(np.float32)
    weight = rng.standard_normal((64, 32)).astype(np.float32)
    reader = Reader.of(weight, high.astype(np.float64) ** 2 / 3)
    through = find_factors(-high, high, UINT8.limits, reader=reader)
    alone = find_factors(-high, high, UINT8.limits)

    def noise(found: Factors) -> float:
        step = found.scale * np.exp2(found.alpha.astype(np.float64))
        return output_noise(step, found.alpha, reader)

    assert through.noise == pytest.approx(noise(through))
    assert through.alpha.max() < alone.alpha.max()
    assert noise(through) < noise(alone)
    assert noise(through) <= find_factors(-high, high, UINT8.limits, max_k=0, reader=reader).noise
