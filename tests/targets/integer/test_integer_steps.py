"""The formulas of the integer target against exact integers, and at their extremes.

Every step is computed three times: by its own NumPy formula, in ONNX Runtime and in the
interpreter, which refuses overflows; all must agree to the bit.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from integer_steps import model_of, run

from ptq_onnx.errors import ModelError
from ptq_onnx.targets.integer.attention import LogAttentionStep, ShareAttentionStep
from ptq_onnx.targets.integer.elementwise import MeanStep, SumStep, Term, gelu, table_step
from ptq_onnx.targets.integer.fixed_point import FixedPoint, fixed_point
from ptq_onnx.targets.integer.gelu import gelu_step
from ptq_onnx.targets.integer.grid import Grid, Ints, LogGrid, ShareGrid
from ptq_onnx.targets.integer.layer_norm import LayerNormStep, layer_norm_step
from ptq_onnx.targets.integer.products import ConvStep, LinearStep, ProductStep, largest_sum
from ptq_onnx.targets.integer.softmax import Kind, SoftmaxStep
from ptq_onnx.targets.integer.square_root import integer_sqrt

SEEDS = st.integers(0, 2**32 - 1)
EASY = settings(max_examples=15)


def grid(scale: float, zero: int, alpha: object = 0, high: int = 255) -> Grid:
    exponents = np.asarray(alpha, np.int64)
    return Grid(scale * np.exp2(exponents), np.array(zero), 0, high, exponents, scale)


def term(of: Grid) -> Term:
    assert of.alpha is not None
    return Term(of.zero, of.alpha, widen=True)


def identity(limit: int = 255) -> FixedPoint:
    """Requantization by 1."""
    return fixed_point([np.ones(())], np.zeros(()), [1 << 20], (0, limit))


# --- requantization ---------------------------------------------------------------------


@settings(max_examples=200)
@given(
    st.floats(2.0**-40, 2.0**20),
    st.floats(-300, 300),
    st.integers(-(2**31), 2**31 - 1),
    st.sampled_from([8, 16, 24, 31]),
    st.booleans(),
)
@example(0.99999, 0.0, 129, 8, False)  # 255.997 is 256 in whole numbers, one bit more
@example(0.99999, 0.0, -128, 8, False)
@example(float(np.nextafter(0.5, 0)), 0.0, 2**31 - 1, 31, True)
def test_requantization_is_exact_scaling_and_rounding(
    ratio: float, constant: float, value: int, bits: int, negative: bool
) -> None:
    """y = ⌊a m + c + ½⌋ but for what the multiplier's own rounding can move over a tie."""
    ratio = -ratio if negative else ratio
    step = fixed_point(
        [np.array(ratio)], np.array(constant), [1 << 31], (-(1 << 20), 1 << 20), bits
    )
    found = int(step(np.array([value]))[0])
    m, n = int(step.multipliers[0]), int(step.shift)
    assert abs(m) < 1 << bits
    assert found == min(max((value * m + int(step.constant)) >> n, -(1 << 20)), 1 << 20)
    exact = Fraction(value) * Fraction(ratio) + Fraction(constant)
    error = Fraction(abs(value) + 1, 1 << (n + 1)) + Fraction(1, 1 << 40)
    saturated = abs(m) == (1 << bits) - 1 and n == 0
    if not saturated and abs(exact) < 1 << 20:
        assert math.floor(exact - error + Fraction(1, 2)) <= found
        assert found <= math.floor(exact + error + Fraction(1, 2))


def test_rounding_is_half_up() -> None:
    step = fixed_point([np.array(0.5)], np.zeros(()), [1 << 20], (-100, 100))
    assert step(np.array([-3, -1, 1, 3, 5])).tolist() == [-1, 0, 1, 2, 3]


def test_multipliers_have_the_width_that_is_asked_for() -> None:
    for bits in (8, 16, 31):
        ratios = np.array([1e-3, 0.37, 5.0, 0.9999999])
        step = fixed_point([ratios], np.zeros(4), [1 << 20], (0, 255), bits)
        (m,) = step.multipliers
        assert all(1 << (bits - 1) <= int(v) < 1 << bits for v in m)
        np.testing.assert_allclose(m / np.exp2(step.shift), ratios, rtol=2.0**-bits)


def test_tiny_ratios_lose_bits_of_their_multiplier_and_nothing_else() -> None:
    step = fixed_point([np.array(1e-30)], np.array(77.0), [1 << 31], (0, 255))
    assert int(step.shift) == 46
    assert int(step(np.array([2**31 - 1]))[0]) == 77


@EASY
@given(SEEDS)
@example(1329974)  # a value 0.003 steps from a boundary, where the multipliers round by 0.007
def test_sums_of_codes_and_accumulators(seed: int) -> None:
    """Residual: x on its common grid plus an accumulator, requantized once, per channel.

    Multipliers and constant are rounded to 2^-n, so that the sum is off by at most
    (|x| + |acc| + 1) 2^-(n+1) output steps.
    """
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (2, 5, 8)).astype(np.uint8)
    codes[0, 0], codes[0, 1] = 0, 255
    acc = rng.integers(-(2**26), 2**26, (2, 5, 8)).astype(np.int32)
    read, made = grid(0.03, 100, rng.integers(0, 13, 8)), grid(0.05, 90, rng.integers(0, 13, 8))
    weight = rng.uniform(1e-8, 1e-6, 8)
    bias = rng.normal(0, 1, 8)
    plain = Term(np.array(0), np.array(0), widen=False)
    finish = fixed_point(
        [np.array(0.03) / made.scale, weight / made.scale],
        bias / made.scale + 90,
        [255 << 12, 1 << 26],
        (0, 255),
    )
    step = SumStep((term(read), plain), finish)
    found = step(codes.astype(np.int64), acc.astype(np.int64))
    np.testing.assert_array_equal(run(step, codes, acc), found)
    real = (codes.astype(np.int64) - 100) * read.scale + acc * weight + bias
    expected = np.clip(np.floor(real / made.scale + 90 + 0.5), 0, 255)
    whole = np.abs((codes.astype(np.int64) - 100) * (read.scale / 0.03))
    off = (whole + np.abs(acc.astype(np.float64)) + 1) * np.exp2(-(finish.shift + 1.0))
    near = np.abs(real / made.scale + 0.5 - np.rint(real / made.scale + 0.5)) <= off + 1e-9
    np.testing.assert_array_equal(found[~near], expected[~near])


@EASY
@given(SEEDS, st.booleans())
def test_pooling(seed: int, keep: bool) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (2, 7, 6)).astype(np.uint8)
    read, made = grid(0.03, 100, rng.integers(0, 4, 6)), grid(0.02, 120)
    finish = fixed_point([np.array(0.03 / 7 / 0.02)], np.array(120.0), [255 * 7 << 3], (0, 255))
    step = MeanStep(term(read), (1,), keep, finish)
    found = step(codes.astype(np.int64))
    np.testing.assert_array_equal(run(step, codes), found)
    real = ((codes.astype(np.int64) - 100) * read.scale).mean(axis=1, keepdims=keep)
    assert np.abs(found - np.clip(real / made.scale + 120, 0, 255)).max() <= 0.5 + 1e-6


# --- products ---------------------------------------------------------------------------


@pytest.mark.parametrize("extreme", [False, True])
def test_linears_multiply_bytes_exactly(extreme: bool) -> None:
    """All codes 0 or 255 against all weights -128 or 127, 3072 deep: what would saturate the
    16-bit sums of some kernels."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, 3072)).astype(np.uint8)
    weight = rng.integers(-128, 128, (3072, 4))
    if extreme:
        x[0], x[1] = 255, 0
        weight[:, 0], weight[:, 1] = -128, 127
    for zero in (0, 255, 119):
        step = LinearStep(weight, zero, None)
        expected = (x.astype(object) - zero) @ weight.astype(object)
        np.testing.assert_array_equal(run(step, x), expected.astype(np.int64))
        np.testing.assert_array_equal(step(x.astype(np.int64)), expected.astype(np.int64))
        assert np.abs(expected).max() <= largest_sum(weight, zero, (0, 255), 1)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("zero", "low", "high"), [(77, 10, 200), (0, 0, 255), (255, 0, 255), (128, 128, 131), (5, 9, 9)]
)
def test_the_largest_sum_is_that_of_the_worst_input(
    zero: int, low: int, high: int, axis: int
) -> None:
    """Of all inputs at their limits; reached on either side."""
    rng = np.random.default_rng(axis)
    for weight in (rng.integers(-128, 128, (6, 6)), rng.integers(-128, 1, (6, 6))):
        rows = weight.tolist() if axis == 0 else weight.T.tolist()
        sums = [
            sum((x - zero) * w for x, w in zip(corner, row, strict=True))
            for row in rows
            for corner in itertools.product((low, high), repeat=6)
        ]
        kernel = weight.reshape(6, 2, 3, 1) if axis == 0 else weight
        assert largest_sum(kernel, zero, (low, high), axis) == max(map(abs, sums))


def test_patch_embedding() -> None:
    rng = np.random.default_rng(0)
    x, weight = (
        rng.integers(0, 256, (2, 3, 8, 8)).astype(np.uint8),
        rng.integers(-128, 128, (5, 3, 4, 4)),
    )
    step = ConvStep(weight, 117, None, strides=(4, 4))
    found = run(step, x)
    np.testing.assert_array_equal(found, step(x.astype(np.int64)))
    corner = (x[1, :, 4:, :4].astype(int) - 117) * weight[2]
    assert found[1, 2, 1, 0] == corner.sum()


def test_products_of_activations() -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, 256, s).astype(np.uint8) for s in ((2, 3, 5, 4), (2, 3, 4, 5)))
    step = ProductStep((255, 0), None)
    expected = (x.astype(np.int64) - 255) @ y.astype(np.int64)
    np.testing.assert_array_equal(run(step, x, y), expected)
    np.testing.assert_array_equal(step(x.astype(np.int64), y.astype(np.int64)), expected)


# --- square root and LayerNorm ----------------------------------------------------------


@settings(max_examples=300)
@given(st.integers(2**30, 2**31 - 1))
def test_square_root_around_squares(n: int) -> None:
    """n² - 1, n² and n² + 2n, the last before (n + 1)²."""
    w = [v for v in (n * n - 1, n * n, n * n + 1, n * n + 2 * n) if 2**60 <= v < 2**62]
    assert integer_sqrt(np.array(w)).tolist() == [math.isqrt(v) for v in w]


@settings(max_examples=300)
@given(st.integers(2**60, 2**62 - 1))
def test_square_root_of_any_number(w: int) -> None:
    assert int(integer_sqrt(np.array([w]))[0]) == math.isqrt(w)


def test_square_root_at_the_ends_and_at_many_random_squares() -> None:
    ends = [2**60, 2**60 + 1, 2**62 - 1, 2**62 - 2]
    assert integer_sqrt(np.array(ends)).tolist() == [math.isqrt(v) for v in ends]
    n = np.random.default_rng(0).integers(2**30, 2**31 - 1, 200_000)
    for offset, root in ((-1, n - 1), (0, n), (1, n)):
        keep = n > 2**30
        np.testing.assert_array_equal(integer_sqrt((n * n + offset)[keep]), root[keep])
    np.testing.assert_array_equal(integer_sqrt(n * n + 2 * n), n)


def norm(
    channels: int, alpha: object, rng: np.random.Generator, scale: float = 0.02, high: int = 255
) -> LayerNormStep:
    read = grid(scale, int(rng.integers(0, high + 1)), alpha, high)
    made = grid(float(rng.uniform(0.01, 0.05)), 128, rng.integers(0, 4, channels))
    gamma, beta = rng.normal(1, 0.5, channels), rng.normal(0, 0.5, channels)
    return layer_norm_step("norm", term(read), read, made, gamma, beta, 1e-6)


@EASY
@given(SEEDS, st.sampled_from([2, 8, 192]), st.sampled_from([0, 3, 12]))
def test_layer_norm_is_that_of_big_integers(seed: int, channels: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    step = norm(channels, rng.integers(0, most + 1, channels), rng)
    codes = rng.integers(0, 256, (6, channels)).astype(np.uint8)
    codes[0], codes[1] = 255, 0
    codes[2] = np.arange(channels) % 2 * 255
    found = step(codes.astype(np.int64))
    np.testing.assert_array_equal(run(step, codes), found)
    for row, got in zip(step.term(codes.astype(np.int64)), found, strict=True):
        x = [int(v) for v in row]
        w = channels * sum(v * v for v in x) - sum(x) ** 2 + step.epsilon
        k = sum(w < 1 << (60 - 2 * j) for j in range(30))
        m = (1 << (30 + step.bits)) // math.isqrt(w << 2 * k)
        shift = 30 + step.bits - 20 - k
        t = [((channels * v - sum(x)) * m + (1 << (shift - 1))) >> shift for v in x]
        np.testing.assert_array_equal(got, step.finish(np.array(t)))


@EASY
@given(SEEDS, st.sampled_from([64, 192, 768]))
def test_layer_norm_is_near_the_real_one(seed: int, channels: int) -> None:
    """Within half a code and a thousandth of LayerNorm in float64."""
    rng = np.random.default_rng(seed)
    alpha = rng.integers(0, 6, channels)
    read, made = grid(0.02, 117, alpha), grid(0.02, 128, rng.integers(0, 4, channels))
    gamma, beta = rng.normal(1, 0.5, channels), rng.normal(0, 0.5, channels)
    step = layer_norm_step("norm", term(read), read, made, gamma, beta, 1e-6)
    codes = rng.integers(0, 256, (4, channels))
    x = (codes - 117) * read.scale
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    y = (x - x.mean(axis=-1, keepdims=True)) / deviation * gamma + beta
    expected = np.clip(y / made.scale + 128, 0, 255)
    assert np.abs(step(codes) - expected).max() <= 0.501


@pytest.mark.parametrize("channels", [192, 768, 1024])
def test_layer_norm_at_its_widest_overflows_nowhere(channels: int) -> None:
    """α = 12 and codes at both ends: V beyond 2^51; a constant row has variance zero."""
    rng = np.random.default_rng(0)
    step = norm(channels, np.full(channels, 12), rng)
    codes = np.zeros((4, channels), np.uint8)
    codes[0, ::2], codes[1, 0], codes[2] = 255, 255, 77
    x = step.term(codes.astype(np.int64))
    spread = channels * (x * x).sum(-1) - x.sum(-1) ** 2
    assert spread.max() > 1 << 51
    assert spread[2] == 0
    np.testing.assert_array_equal(run(step, codes), step(codes.astype(np.int64)))


@EASY
@given(SEEDS, st.sampled_from([(2, 12), (8, 12), (192, 7), (768, 5)]))
def test_layer_norm_of_sixteen_bits(seed: int, widest: tuple[int, int]) -> None:
    """Equal in all runtimes and near LayerNorm in float64, at the widest factors that fit."""
    channels, most = widest
    rng = np.random.default_rng(seed)
    alpha = rng.integers(0, most + 1, channels)
    alpha[0] = most
    step = norm(channels, alpha, rng, scale=1e-4, high=65535)
    codes = rng.integers(0, 65536, (6, channels)).astype(np.uint16)
    codes[0], codes[1], codes[2] = 65535, 0, np.arange(channels) % 2 * 65535
    found = run(step, codes)
    np.testing.assert_array_equal(found, step(codes.astype(np.int64)))
    x = step.term(codes.astype(np.int64)).astype(np.float64)
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + step.epsilon / channels**2)
    t = (x - x.mean(axis=-1, keepdims=True)) / deviation * 2.0**20
    np.testing.assert_allclose(
        step.normalised(step.term(codes.astype(np.int64))), t, rtol=1e-6, atol=2
    )


def test_a_sum_of_sixteen_bits() -> None:
    """Codes of 16 bits and an accumulator to codes of 16 bits: rounding half up, and its type."""
    of, rng = grid(1.0, 30000, [0, 1, 2], 65535), np.random.default_rng(0)
    codes = rng.integers(0, 65536, (50, 3)).astype(np.uint16)
    total = rng.integers(-(1 << 20), 1 << 20, (50, 3)).astype(np.int32)
    plain = Term(np.zeros((), np.int64), np.zeros((), np.int64), widen=False)
    finish = fixed_point(
        [np.array(0.5), np.array(0.03)], np.array(9.0), [1 << 18, 1 << 20], (0, 65535)
    )
    step = SumStep((term(of), plain), finish)
    exact = ((codes.astype(np.int64) - 30000) << np.arange(3)) * 0.5 + total * 0.03 + 9
    found = run(step, codes, total)
    assert np.abs(found - np.clip(exact, 0, 65535)).max() <= 0.501
    assert found.max() == 65535
    assert model_of(step, codes, total).graph.output[0].type.tensor_type.elem_type == 4  # uint16


def test_layer_norm_that_could_overflow_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ModelError, match=r"768 channels with factors up to 2.6 overflow 64 bits"):
        norm(768, np.full(768, 6), rng, high=65535)
    with pytest.raises(ModelError, match=r"Node 'norm' .LayerNormalization.*smaller --ptf-k"):
        norm(4096, np.full(4096, 12), rng)


# --- softmax ----------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.floats(2.0**-30, 2.0**10),
    st.sampled_from([2, 3, 4, 6, 8]),
    st.sampled_from(["log2", "uniform", "shares"]),
    SEEDS,
)
def test_softmax_is_that_of_big_integers(scale: float, bits: int, kind: Kind, seed: int) -> None:
    rng = np.random.default_rng(seed)
    step = SoftmaxStep(scale, 65, bits, kind)
    codes = np.clip(np.rint(rng.normal(128, rng.uniform(0, 128), (9, 65))), 0, 255)
    codes[0], codes[1] = 0, 255
    codes[2, 1:], codes[2, 0] = 0, 255
    found = step(codes.astype(np.int64))
    np.testing.assert_array_equal(run(step, codes.astype(np.uint8)), found)
    ln2, b, c = step.constants
    for row, got in zip(codes.astype(int).tolist(), found.tolist(), strict=True):
        e = []
        for code in row:
            q, r = divmod((max(row) - code) << step.fraction, ln2)
            e.append((c - r * (b - r)) >> min(q + step.down, 31))
        assert 2 * sum(e) + max(e) < 1 << 31
        top = (1 << bits) - 1
        if kind == "shares":
            assert got == [math.floor(Fraction(top * v, max(e)) + Fraction(1, 2)) for v in e]
            assert max(got) == top
            continue
        if kind == "uniform":
            assert got == [min((2 * top * v + sum(e)) // (2 * sum(e)), top) for v in e]
            continue
        for value, code in zip(e, got, strict=True):
            if value == 0:
                assert code == step.last + 1
                continue
            t = (2 * sum(e) + value) // (2 * value)
            k = t.bit_length() - 1
            assert code == min(k + (2 * t >= 3 * 2**k), step.last + 1)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-14, 0.2, 1.0, 255.9, 256.0, 2.0**20])
@pytest.mark.parametrize("tokens", [2, 197, 1025, 16384])
def test_the_exponential_fits_its_bits(scale: float, tokens: int) -> None:
    step = SoftmaxStep(scale, tokens, 8, "log2")
    ln2, b, c = step.constants
    assert 2.0**-14 <= step.unit <= 2.0**-13
    assert 255 << step.fraction < 1 << 29
    assert c < 1 << 30
    assert max(r * (b - r) for r in (0, ln2 // 2, ln2 - 1)) < 1 << 29
    assert (c >> step.down).bit_length() == step.exp_bits
    assert tokens << step.exp_bits <= 1 << 29
    assert (c >> step.down) >= -(-3 * (1 << step.last) // 2)  # e = 0 is beyond the last code
    e = step.exponentials(np.array([[0, 255], [255, 255]]))
    assert e.max() == c >> step.down == step.largest
    assert 2 * step.top * step.largest + step.largest < 1 << 31  # shares of the largest


@pytest.mark.parametrize("scale", [0.01, 0.05, 0.2, 0.7])
def test_the_exponential_is_near_the_real_one(scale: float) -> None:
    """I-BERT's polynomial is within 0.3 % of exp, the grid within as much again."""
    step = SoftmaxStep(scale, 197, 8, "log2")
    codes = np.arange(256)
    e = step.exponentials(codes)
    real = np.exp((codes - 255) * scale)
    large = real > 2.0**-10
    np.testing.assert_allclose((e / e.max())[large], real[large], rtol=6e-3)


def test_codes_of_a_softmax() -> None:
    """One row by hand: values 1, 1/2, and one that 4 bits have no code for."""
    step = SoftmaxStep(math.log(2), 4, 4, "log2")
    assert step.last == 14
    codes = step(np.array([[100, 100, 99, 60]]))
    assert codes.tolist() == [[1, 1, 2, 15]]
    assert LogGrid.codes(14).floats(codes).tolist() == [[0.5, 0.5, 0.25, 0.0]]
    assert LogGrid.codes(14).ints(np.array([[0.5, 0.5, 0.25, 0.0]])).tolist() == codes.tolist()


# --- A·V --------------------------------------------------------------------------------


@EASY
@given(SEEDS, st.sampled_from([2, 6, 7, 14, 19]), st.sampled_from([0, 131, 255]))
def test_attention_is_the_rounded_quotient(seed: int, last: int, zero: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, last + 2, (2, 3, 5, 9)).astype(np.uint8)
    codes[0, 0, 0], codes[0, 0, 1] = last + 1, 0
    values = rng.integers(0, 256, (2, 3, 9, 4)).astype(np.uint8)
    values[1] = 255 if zero < 128 else 0
    finish = fixed_point([np.array(2.0**-16)], np.array(128.0), [256 << 16], (0, 255))
    step = LogAttentionStep(1 << last, zero, 9, finish)
    found = step(codes.astype(np.int64), values.astype(np.int64))
    limits = {"x0": (0, last + 1)}
    np.testing.assert_array_equal(run(step, codes, values, limits=limits), found)
    w = np.where(codes > last, 0, 2.0 ** (last - codes.astype(int)))
    total = np.maximum(w.sum(axis=-1, keepdims=True), 1)
    real = w @ (values.astype(int) - zero) / total + 128
    assert np.abs(found - np.clip(real, 0, 255)).max() <= 0.5 + 2.0**-16


def test_attention_at_its_widest_overflows_nowhere() -> None:
    """4,096 tokens of code 0: rows of 2^31."""
    codes = np.zeros((1, 1, 2, 4096), np.uint8)
    values = np.zeros((1, 1, 4096, 3), np.uint8)
    values[..., 0], values[..., 1] = 255, 128
    finish = fixed_point([np.array(2.0**-16)], np.array(128.0), [256 << 16], (0, 255))
    step = LogAttentionStep(1 << 19, 128, 4096, finish)
    found = run(step, codes, values, limits={"x0": (0, 20)})
    assert found[0, 0].tolist() == [[255, 128, 0]] * 2


def test_a_softmax_in_shares_by_hand() -> None:
    """Halves and quarters of the largest; what is read of it are rows that sum to one."""
    step = SoftmaxStep(math.log(2), 5, 8, "shares")
    codes = step(np.array([[100, 100, 99, 98, 60]]))
    assert codes.tolist() == [[255, 255, 127, 64, 0]]  # 127.5, and a polynomial for exp
    shares = ShareGrid.codes(255)
    floats = shares.floats(codes)
    np.testing.assert_allclose(floats, codes / 701, rtol=1e-7)
    np.testing.assert_array_equal(shares.ints(floats), codes)
    np.testing.assert_array_equal(shares.ints(floats * 3), codes)


@EASY
@given(SEEDS, st.sampled_from([15, 63, 255]), st.sampled_from([0, 131, 255]))
def test_attention_by_shares_is_the_rounded_quotient(seed: int, top: int, zero: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, top + 1, (2, 3, 5, 9)).astype(np.uint8)
    codes[..., 4] = top
    codes[0, 0, 0] = top
    values = rng.integers(0, 256, (2, 3, 9, 4)).astype(np.uint8)
    values[1] = 255 if zero < 128 else 0
    finish = fixed_point([np.array(2.0**-16)], np.array(128.0), [256 << 16], (0, 255))
    step = ShareAttentionStep(top, zero, 9, finish)
    found = step(codes.astype(np.int64), values.astype(np.int64))
    np.testing.assert_array_equal(run(step, codes, values, limits={"x0": (0, top)}), found)
    w = codes.astype(np.float64)
    real = w @ (values.astype(int) - zero) / w.sum(axis=-1, keepdims=True) + 128
    assert np.abs(found - np.clip(real, 0, 255)).max() <= 0.5 + 2.0**-16


# --- tables -----------------------------------------------------------------------------


def activation(op_type: str, **attributes: str) -> ir.Node:
    return ir.node(op_type, [ir.Value(name="x")], attributes)


@EASY
@given(SEEDS, st.booleans())
def test_gelu_is_exact_to_its_input(seed: int, factors: bool) -> None:
    rng = np.random.default_rng(seed)
    read = grid(0.02, 130, rng.integers(0, 3, 12) if factors else 0)
    made = grid(0.03, 9, rng.integers(0, 3, 12) if factors else 0)
    step = table_step(activation("Gelu"), read, made)
    codes = rng.integers(0, 256, (3, 7, 12)).astype(np.uint8)
    found = step(codes.astype(np.int64))
    np.testing.assert_array_equal(run(step, codes), found)
    y = gelu((codes - 130.0) * read.scale, "none")
    np.testing.assert_array_equal(found, np.clip(np.rint(y / made.scale) + 9, 0, 255))
    pairs = (
        len({(int(a), int(c)) for a, c in zip(read.alpha, made.alpha, strict=True)})
        if factors
        else 1
    )  # type: ignore[arg-type]
    assert step.tables.shape == (pairs, 256)


def i_gelu(x: np.ndarray) -> np.ndarray:
    """I-BERT's polynomial in float64, as the paper has it."""
    v = np.minimum(np.abs(x) / math.sqrt(2), 1.769)
    return x / 2 * (1 + np.sign(x) * (-0.2888 * (v - 1.769) ** 2 + 1))


@EASY
@given(SEEDS, st.floats(2.0**-8, 0.2), st.integers(0, 255), st.booleans())
def test_gelu_by_polynomial(seed: int, scale: float, zero: int, factors: bool) -> None:
    """That of big integers, I-BERT's within its grid of 2^-10, and the real one within 0.0182."""
    rng = np.random.default_rng(seed)
    read = grid(scale, zero, rng.integers(0, 4, 12) if factors else 0)
    made = grid(scale, 9, rng.integers(0, 4, 12) if factors else 0)
    step = gelu_step(read, made)
    codes = rng.integers(0, 256, (3, 7, 12)).astype(np.uint8)
    codes[0, 0], codes[0, 1], codes[0, 2] = 0, 255, zero
    found = step(codes.astype(np.int64))
    np.testing.assert_array_equal(run(step, codes), found)
    x = (codes.astype(np.float64) - zero) * read.scale
    unclipped = i_gelu(x) / made.scale + 9
    grids = np.abs(x) * 2 * 0.2888 * 1.769 * 2.0**-10 / 2 / made.scale  # erf's slope times u
    nearest = np.clip(unclipped, 0, 255)
    assert np.all(np.abs(found - nearest) <= 0.5001 + grids)
    real = np.clip(gelu(x, "none") / made.scale + 9, 0, 255)
    assert np.all(np.abs(found - real) <= 0.5001 + grids + 0.0182 / made.scale)
    exact = []
    m = np.broadcast_to(step.multiplier, codes.shape)
    for code, by in zip(codes.ravel().tolist(), m.ravel().tolist(), strict=True):
        d = code - zero
        e = 3_630_803 - (1811 - min((abs(d) * by + 2048) >> 12, 1811)) ** 2
        exact.append(d * (3_630_803 + (e if d >= 0 else -e)))
    np.testing.assert_array_equal(found, step.finish(np.array(exact).reshape(codes.shape)))


@pytest.mark.parametrize("scale", [1e-12, 2.0**-12, 0.03, 1.0, 1e6])
@pytest.mark.parametrize("zero", [0, 130, 255])
@pytest.mark.parametrize("alpha", [0, 12])
def test_gelu_by_polynomial_at_its_extremes(scale: float, zero: int, alpha: int) -> None:
    """All codes: nothing leaves its type, erf stays in [-1, 1], large x pass, small ones halve."""
    read = grid(scale, zero, np.full(1, alpha))
    made = grid(scale, zero, np.full(1, alpha))
    step = gelu_step(read, made)
    codes = np.arange(256).astype(np.uint8).reshape(256, 1)
    found = step(codes.astype(np.int64))
    np.testing.assert_array_equal(run(step, codes), found)
    x = (codes - float(zero)) * read.scale
    assert np.abs(found - (i_gelu(x) / made.scale + zero)).max() <= 0.76
    assert found[zero, 0] == zero
    large = x[:, 0] > 3
    assert np.array_equal(found[large], codes[large])


def test_other_activations() -> None:
    read, made = grid(0.05, 128), grid(0.05, 128)
    x = (np.arange(256) - 128) * 0.05
    for op_type, expected in {
        "Relu": np.maximum(x, 0),
        "Sigmoid": 1 / (1 + np.exp(-x)),
        "QuickGelu": x / (1 + np.exp(-1.702 * x)),
        "Tanh": np.tanh(x),
    }.items():
        table = table_step(activation(op_type), read, made).tables[0]
        assert np.abs((table - 128.0) * 0.05 - expected).max() <= 0.0251, op_type
    tanh = table_step(activation("Gelu", approximate="tanh"), read, made).tables[0]
    exact = table_step(activation("Gelu"), read, made).tables[0]
    assert np.abs(tanh.astype(int) - exact).max() <= 1


def test_grids_find_their_integers_again() -> None:
    codes = np.arange(256)
    for zero, alpha in ((0, 0), (117, 5), (255, 12)):
        of = grid(0.0123, zero, np.full(1, alpha))
        np.testing.assert_array_equal(of.ints(of.floats(codes)), codes)
    wide: Ints = np.random.default_rng(0).integers(-(2**30), 2**30, 1000)
    acc = Grid(
        np.array(1.7e-5), np.array(0), -(2**30), 2**30, offset=np.array(3.3), accumulator=True
    )
    np.testing.assert_array_equal(acc.ints(acc.floats(wide)), wide)


def test_a_softmax_over_steps_of_256_and_more_has_the_grid_of_256() -> None:
    """Of steps so large only the maximum is left: the unit is 256 / 2^21, and no finer step's."""
    for scale in (256.0, 300.0, 1e6):
        step = SoftmaxStep(scale, 5, 8, "log2")
        assert (step.fraction, step.unit) == (21, 256 / 2**21)
    below = SoftmaxStep(100.0, 5, 8, "log2")
    assert (below.fraction, below.unit) == (20, 100 / 2**20)
