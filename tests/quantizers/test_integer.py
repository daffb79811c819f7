"""Integer LayerNorm and softmax against float64, with the bounds that they keep."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ptq_onnx.quantizers.integer import (
    EXP_B,
    EXP_C,
    EXP_FRACTION_BITS,
    EXP_SHIFT,
    IntegerLayerNorm,
    IntegerSoftmax,
    floor_log2,
    multiplier,
)
from ptq_onnx.quantizers.log2 import log2_codes, top_code

Ints = NDArray[np.int64]
Double = NDArray[np.float64]


def layer_norm(
    channels: int, max_alpha: int, bits: int, seed: int
) -> tuple[IntegerLayerNorm, Ints]:
    """A LayerNorm with random constants, and codes [64, channels] for it."""
    rng = np.random.default_rng(seed)
    zero = int(rng.integers(100, 156))
    return IntegerLayerNorm(
        zero_point=zero,
        alpha=rng.integers(0, max_alpha + 1, channels),
        in_scale=float(rng.uniform(0.002, 0.2)),
        gamma=rng.normal(1, 0.5, channels),
        beta=rng.normal(0, 0.3, channels),
        epsilon=1e-6,
        out_scale=np.array(rng.uniform(0.01, 0.1)),
        out_zero_point=128,
        limits=(0, 255),
        bits=bits,
    ), np.clip(np.rint(rng.normal(zero, 30, (64, channels))), 0, 255).astype(np.int64)


def exact(norm: IntegerLayerNorm, codes: Ints) -> tuple[Double, Double]:
    """Codes before rounding by float64 LayerNorm, and how far integer ones may be from them.

    Half a code for the last rounding, |A X| / 2^(bits-1) for the truncation of M, |A| / 2^bits
    for the rounding of B, and X / 2^31 where N ends. No bound where |A| >= 2^bits, beyond M:
    one step of the input is then more than the whole output.
    """
    x = (codes - norm.zero_point) * 2.0**norm.alpha * norm.in_scale
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + norm.epsilon)
    slope = norm.gamma / (deviation * norm.out_scale)
    value = (x - x.mean(axis=-1, keepdims=True)) * slope + norm.beta / norm.out_scale
    truncated = np.abs(slope) * (np.abs(x) + norm.in_scale / 2) / 2 ** (norm.bits - 1)
    bound = 0.5 + truncated + np.abs(x) / norm.in_scale / 2**31 + 1e-6
    saturated = np.abs(slope) * norm.in_scale >= 2**norm.bits
    return value + norm.out_zero_point, np.where(saturated, np.inf, bound)


@settings(max_examples=60)
@given(
    st.integers(2, 200),
    st.sampled_from([0, 3, 7, 12]),
    st.sampled_from([8, 12, 16]),
    st.integers(0, 2**32 - 1),
)
def test_layer_norm_is_within_its_bound(channels: int, alpha: int, bits: int, seed: int) -> None:
    norm, codes = layer_norm(channels, alpha, bits, seed)
    value, bound = exact(norm, codes)
    assert np.all(np.abs(norm(codes) - np.clip(value, 0, 255)) <= bound)


@pytest.mark.parametrize(("bits", "equal"), [(16, 0.999), (12, 0.99), (8, 0.9)])
def test_layer_norm_gives_the_codes_of_the_float_one(bits: int, equal: float) -> None:
    found = []
    for seed in range(10):
        norm, codes = layer_norm(192, 3, bits, seed)
        value = np.clip(np.rint(exact(norm, codes)[0]), 0, 255)
        difference = np.abs(norm(codes) - value)
        assert difference.max() <= 2
        found.append(np.mean(difference == 0))
    assert np.mean(found) >= equal


def test_layer_norm_to_channels_of_their_own_scale() -> None:
    norm, codes = layer_norm(192, 7, 16, 0)
    factors = np.exp2(np.arange(192) % 4)
    wide = IntegerLayerNorm(**{**vars(norm), "out_scale": norm.out_scale * factors})
    value = np.clip(np.rint(exact(wide, codes)[0]), 0, 255)
    assert np.mean(wide(codes) == value) >= 0.999


def test_layer_norm_of_constant_rows_and_zero_gamma_is_beta() -> None:
    """β, though μ and M X, both large where σ is small, cancel only within the bound."""
    norm, codes = layer_norm(64, 0, 16, 1)
    beta = np.clip(norm.beta / norm.out_scale + 128, 0, 255)
    for code in (0, norm.zero_point, norm.zero_point + 9, 255):
        constant = np.full((1, 64), code)
        assert np.all(np.abs(norm(constant) - beta) <= exact(norm, constant)[1])
    flat = IntegerLayerNorm(**{**vars(norm), "gamma": np.zeros(64)})
    np.testing.assert_array_equal(flat(codes), np.broadcast_to(np.rint(beta), codes.shape))


def slow_layer_norm(norm: IntegerLayerNorm, row: list[int]) -> list[int]:
    """One row in Python's integers, which do not overflow."""
    x = [(c - norm.zero_point) << int(a) for c, a in zip(row, norm.alpha, strict=True)]
    size, total = len(x), sum(x)
    spread = size * sum(v * v for v in x) - total * total
    sigma = math.sqrt(spread / size**2 + norm.epsilon / norm.in_scale**2)
    out = []
    for v, gamma, beta in zip(x, norm.gamma, norm.beta, strict=True):
        a = gamma / (sigma * float(norm.out_scale))
        shift = min(max(norm.bits - 1 - math.floor(math.log2(abs(a))), 0), 31)
        m = min(math.floor(abs(a) * 2**shift), 2**norm.bits - 1)
        offset = (beta - total / size * gamma / sigma) / float(norm.out_scale)
        b = round(offset * 2**shift)
        y = ((m if a > 0 else -m) * v + b + (1 << shift >> 1)) >> shift
        out.append(min(max(y + norm.out_zero_point, norm.limits[0]), norm.limits[1]))
    return out


@pytest.mark.parametrize("pattern", ["one high", "half", "all high", "random"])
@pytest.mark.parametrize("max_alpha", [0, 12])
def test_layer_norm_does_not_overflow(pattern: str, max_alpha: int) -> None:
    """1,024 channels of the largest codes and factors: the same as without a width."""
    channels = 1024
    rng = np.random.default_rng(0)
    row = np.zeros(channels, np.int64)
    if pattern == "one high":
        row[5] = 255
    elif pattern == "half":
        row[::2] = 255
    elif pattern == "all high":
        row[:] = 255
    else:
        row = rng.integers(0, 256, channels)
    norm = IntegerLayerNorm(
        zero_point=0,
        alpha=np.full(channels, max_alpha),
        in_scale=1e-3,
        gamma=rng.normal(0, 2, channels),
        beta=rng.normal(0, 50, channels),
        epsilon=1e-12,
        out_scale=np.array(0.05),
        out_zero_point=0,
        limits=(-128, 127),
    )
    found, expected = norm(row[None])[0], np.array(slow_layer_norm(norm, row.tolist()))
    assert np.abs(found - expected).max() <= 1
    assert np.mean(found == expected) >= 0.999


def test_multiplier() -> None:
    a = np.array([0.0, 1.0, -1.0, 0.75, 2.0**-40, 2.0**40, 255.0, 0.999999])
    n, m = multiplier(a, 8)
    np.testing.assert_array_equal(n, [0, 7, 7, 8, 31, 0, 0, 8])
    np.testing.assert_array_equal(m, [0, 128, 128, 192, 0, 255, 255, 255])
    usual = np.random.default_rng(0).lognormal(0, 3, 1000)
    for bits in (8, 16):
        n, m = multiplier(usual, bits)
        free = (n > 0) & (n < 31)
        ratio = m[free] / np.exp2(n[free]) / usual[free]
        assert np.all((1 - 2.0 ** (1 - bits) < ratio) & (ratio <= 1))
        assert m.max() < 1 << bits


@pytest.mark.parametrize("k", range(1, 53))
def test_floor_log2_is_exact(k: int) -> None:
    power = 1 << k
    np.testing.assert_array_equal(
        floor_log2(np.array([power - 1, power, power + 1])),
        [(power - 1).bit_length() - 1, k, (power + 1).bit_length() - 1],
    )


# --- softmax --------------------------------------------------------------------------------


def logits(scale: float, rows: int = 300, seed: int = 0) -> Ints:
    """Codes of rows like those of attention: a deviation of 2.5, within 8 bits."""
    rng = np.random.default_rng(seed)
    codes = np.clip(np.rint(rng.normal(0, 2.5 / scale, (rows, 197))), -128, 127)
    return codes.astype(np.int64)


def float_softmax(codes: Ints, scale: float) -> Double:
    x = (codes - codes.max(axis=-1, keepdims=True)) * scale
    e = np.exp(x)
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("scale", [1e-4, 0.01, 0.05, 0.1, 0.2])
def test_exponential_is_within_its_bound(scale: float) -> None:
    """0.25 % of exp(-d) times 1 + d: the polynomial, and ⌊ln 2 / s'⌋ once per halving."""
    codes = logits(scale)
    e = IntegerSoftmax(scale, 8, log2=True).exponentials(codes)
    depth = (codes.max(axis=-1, keepdims=True) - codes) * scale
    share = e / e.max(axis=-1, keepdims=True)
    near = depth < 9
    relative = np.abs(share / np.exp(-depth) - 1)[near]
    assert relative.max() <= (0.0025 * (1 + depth[near])).max()
    assert np.all(relative <= 0.0025 * (1 + depth[near]))
    assert 1 << (EXP_SHIFT - 1) <= e.max() < 1 << (EXP_SHIFT + 1)
    assert e.min() >= 0


@pytest.mark.parametrize("scale", [1e-7, 0.003, 0.2, 3.0])
def test_exponential_in_pythons_integers(scale: float) -> None:
    """The formula of the class, one number at a time, without a width."""
    codes = logits(0.05, rows=4)
    softmax = IntegerSoftmax(scale, 8, log2=True)
    unit = softmax.unit
    ln2, b = math.floor(math.log(2) / unit), math.floor(EXP_B / unit)
    c = math.floor(EXP_C / unit**2)
    for row, found in zip(codes.tolist(), softmax.exponentials(codes), strict=True):
        for code, e in zip(row, found, strict=True):
            x = (code - max(row)) * 2**EXP_FRACTION_BITS
            q = -x // max(ln2, 1)
            r = x + q * max(ln2, 1)
            value = max(r * (r + b) + c, 0)
            shift = EXP_SHIFT - c.bit_length()
            value = value << shift if shift > 0 else value >> -shift
            assert e == value >> q


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("scale", "equal"),
    [(1e-4, 0.999), (0.01, 0.99), (0.1, 0.99), (0.2, 0.99), (0.5, 0.97), (1.0, 0.97)],
)
def test_lis_gives_the_codes_of_the_float_softmax(scale: float, equal: float, bits: int) -> None:
    """Never more than one code off."""
    codes = logits(scale)
    found = IntegerSoftmax(scale, bits, log2=True)(codes)
    expected = log2_codes(float_softmax(codes, scale).astype(np.float32), bits)
    difference = np.abs(found - expected)
    if bits == 8:
        # 24 bits of exp end at e^-16.6; the float softmax goes on.
        difference = difference[expected < EXP_SHIFT - 2]
    assert difference.max() <= 1
    assert np.mean(difference == 0) >= equal


@pytest.mark.parametrize("scale", [1e-4, 0.01, 0.1, 0.2])
def test_uniform_codes(scale: float) -> None:
    codes = logits(scale)
    found = IntegerSoftmax(scale, 8, log2=False)(codes)
    value = float_softmax(codes, scale) * 255
    assert np.abs(found - value).max() <= 0.7
    assert np.mean(found == np.rint(value)) >= 0.99
    assert found.min() >= 0
    assert found.max() <= 255


@pytest.mark.parametrize("bits", [4, 8])
def test_the_top_code_is_zero(bits: int) -> None:
    """What the shift leaves nothing of has the top code; so has all that is below it."""
    codes = np.array([[0, -1, -200]])
    found = IntegerSoftmax(0.5, bits, log2=True)(codes)
    assert found[0, 2] == top_code(bits)
    assert found[0, 0] <= 1
    levels = IntegerSoftmax(0.2, bits, log2=True)(logits(0.2))
    assert levels.min() >= 0
    assert levels.max() <= top_code(bits)
    assert np.all(np.diff(IntegerSoftmax(0.2, bits, log2=True)(np.arange(-120, 1)[None])) <= 0)


def test_known_rows() -> None:
    """Equal logits share alike: 1/2, 1/3, 1/4; a lone one has all; ties of t go up."""
    softmax = IntegerSoftmax(0.1, 8, log2=True)
    for size, code in ((1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (8, 3), (12, 4)):
        np.testing.assert_array_equal(softmax(np.full((1, size), 17)), code)
    uniform = IntegerSoftmax(0.1, 8, log2=False)
    np.testing.assert_array_equal(uniform(np.full((1, 5), -3)), 51)
    np.testing.assert_array_equal(uniform(np.array([[127, -128]])), [[255, 0]])


@pytest.mark.parametrize("scale", [2.0**-94, 1e-12, 1e-8, 1e-6, 50.0, 428.0, 1e4, 1e30])
@pytest.mark.parametrize("log2", [True, False])
def test_any_scale_stays_within_int64(scale: float, log2: bool) -> None:
    """From a constant row of logits to absurd ones; nothing overflows, nothing divides by 0."""
    codes = np.array([[0, 255, 254, 255], [0, 0, 0, 0], [0, 0, 0, 255]], np.int64)
    softmax = IntegerSoftmax(scale, 8, log2)
    e = softmax.exponentials(codes)
    assert e.min() >= 0
    assert 0 < e.max(axis=-1).min() <= e.max() < 1 << (EXP_SHIFT + 1)
    with np.errstate(over="ignore"):
        real = float_softmax(codes, scale).astype(np.float32)
    real[real < 2.0**-EXP_SHIFT] = 0
    expected = log2_codes(real, 8) if log2 else np.rint(real * 255)
    np.testing.assert_array_equal(softmax(codes), expected)
