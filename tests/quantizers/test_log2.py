"""Log-Int-Softmax codes against a slow reference in exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ptq_onnx.numerics.codes.log2 import LARGEST_EXPONENT, log2_codes, log2_values, top_code

EXACT_BELOW = 1 << 16


def reciprocal(a: np.float32) -> int:
    """t = round(1 / A), the quotient as float32 first, half to even; exact integers."""
    return round(Fraction(float(np.float32(1) / a)))


def code_of(t: int, bits: int) -> int:
    """⌊log2 t⌋, plus one from 1.5 · 2^⌊log2 t⌋ on, at most the top code."""
    k = max(t, 1).bit_length() - 1
    return min(k + (2 * t >= 3 << k), top_code(bits))


def of(*values: float, bits: int = 8) -> NDArray[np.int32]:
    return log2_codes(np.array(values, np.float32), bits)


@settings(max_examples=500)
@given(st.floats(2.0**-16 * 1.0625, 1, width=32), st.sampled_from([2, 3, 4, 6, 8]))
def test_codes_are_exact(a: float, bits: int) -> None:
    value = np.float32(a)
    assert of(a, bits=bits)[0] == code_of(reciprocal(value), bits)


def test_every_reciprocal_below_the_bound() -> None:
    """All integers t < 2^16, and so every tie t = 3 · 2^k and both its neighbours."""
    t = np.arange(1, EXACT_BELOW)
    a = (1 / t).astype(np.float32)
    expected = np.array([code_of(int(i), 8) for i in t])
    np.testing.assert_array_equal(log2_codes(a, 8), expected)
    np.testing.assert_array_equal(log2_codes(a, 4), np.minimum(expected, 15))


def test_beyond_the_bound_codes_are_at_most_one_off_and_only_beside_the_tie() -> None:
    rng = np.random.default_rng(0)
    ties = np.ldexp(1.5, np.arange(16, 120))
    near = ties[:, None] * (1 + np.linspace(-1e-4, 1e-4, 41))
    anywhere = np.exp2(rng.uniform(16, 125, 2000))
    a = (1 / np.concatenate([near.ravel(), anywhere])).astype(np.float32)
    found = log2_codes(a, 8)
    t = [reciprocal(v) for v in a]
    expected = np.array([code_of(i, 8) for i in t])
    off = found != expected
    assert np.all(np.abs(found - expected) <= 1)
    beside = [abs(Fraction(2 * i, 3 << (i.bit_length() - 1)) - 1) for i in t]
    assert all(
        distance <= Fraction(11, 10**6) for distance, o in zip(beside, off, strict=True) if o
    )
    assert off[: near.size].any(), "the bound is real: without it the docstring says too little"


@pytest.mark.parametrize("k", range(15))
def test_ties_round_up(k: int) -> None:
    """t = 3 · 2^k = 1.5 · 2^(k+1) has code k + 2, the integer below it k + 1."""
    tie = 3 << k
    assert of(1 / tie)[0] == k + 2
    assert of(1 / (tie - 1))[0] == (k + 1 if tie > 3 else 1)
    assert of(2.0**-k)[0] == k


def test_known_codes() -> None:
    np.testing.assert_array_equal(
        of(1, 0.7, 0.5, 0.4, 1 / 3, 0.25, 0.2, 1 / 6), [0, 0, 1, 1, 2, 2, 2, 3]
    )
    # t = round(1.5) = 2 and round(2.5) = 2: half to even.
    np.testing.assert_array_equal(of(2 / 3, 0.4), [1, 1])


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_top_code_is_zero(bits: int) -> None:
    top = top_code(bits)
    assert top == min(2**bits - 1, LARGEST_EXPONENT)
    codes = of(0, 1e-45, 2.0 ** -min(top + 1, 149), bits=bits)
    np.testing.assert_array_equal(codes, top)
    np.testing.assert_array_equal(log2_values(codes, bits), 0)
    below = log2_values(np.array([top - 1], np.int32), bits)
    assert below[0] == np.float32(2.0 ** (1 - top)) > 0
    assert of(2.0 ** (1 - top), bits=bits)[0] == top - 1


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_fall_as_attention_rises(bits: int) -> None:
    a = np.sort(np.random.default_rng(1).uniform(0, 1, 5000).astype(np.float32) ** 6)
    assert np.all(np.diff(log2_codes(a, bits)) <= 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_values_are_the_codes(bits: int) -> None:
    codes = np.arange(top_code(bits) + 1, dtype=np.int32)
    np.testing.assert_array_equal(log2_codes(log2_values(codes, bits), bits), codes)


def test_values_are_within_the_threshold() -> None:
    """1 / A < 1.5 has code 0, so a value is at most 1.5 A; 1 / A > 2.5 has code 2: 0.625 A."""
    a = np.random.default_rng(2).uniform(1e-4, 1, 20000).astype(np.float32)
    ratio = log2_values(log2_codes(a, 8), 8) / a
    assert ratio.max() <= 1.5
    assert ratio.min() >= 0.625
