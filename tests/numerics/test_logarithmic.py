"""Logarithmic codes by known numbers, what they gain, and ties that single precision decides."""

from __future__ import annotations

import numpy as np
import pytest
from test_codes import levels, run_emitted

from ptq_onnx.numerics.codes.code import Numbers
from ptq_onnx.numerics.codes.logarithmic import Logarithmic, border
from ptq_onnx.numerics.codes.uniform import Uniform

CODE = Logarithmic()


def numbers(bits: int = 4, scale: float = 1.0, zero: int = 15, eighths: int = 8) -> Numbers:
    return Numbers(bits, False, np.float32(scale), np.array(zero, np.int32), {"eighths": eighths})


def test_powers_of_two_and_zero() -> None:
    """One code to the octave: 2^-k, the last code zero."""
    x = np.array([1.0, 0.5, 0.76, 0.74, 2.0**-14, 2.0**-15.1, 0.0, 3.0], np.float32)
    codes = CODE.codes(x, numbers())
    assert codes.tolist() == [0, 1, 0, 1, 14, 15, 15, 0]
    values = CODE.values(codes, numbers())
    assert values.tolist() == [1, 0.5, 1, 0.5, 2.0**-14, 0, 0, 1]


def test_the_zero_point_is_the_level_that_means_zero() -> None:
    """Four codes to the octave; M = 2, the level of code 12 is 2 · 2^-3 = 1/4."""
    found = numbers(scale=2.0, zero=12, eighths=32)
    values = CODE.values(np.arange(16), found)
    assert values[12] == 0
    assert values[0] == pytest.approx(1.75)
    assert values[15] == pytest.approx(-0.25)
    assert [float(v) for v in CODE.reach(found)] == pytest.approx([-0.25, 1.75])
    assert values[8] == pytest.approx(2 * 2**-2 - 0.25)


@pytest.mark.parametrize("eighths", [6, 8, 20, 64])
def test_the_border_is_half_way(eighths: int) -> None:
    ratio = 2.0 ** (-8 / eighths)
    assert 2.0 ** (-border(eighths) * 8 / eighths) == pytest.approx((1 + ratio) / 2)
    assert 0 < border(eighths) < 0.5


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_half_way_between_two_levels_one_of_them(bits: int) -> None:
    """In the nodes as in the arithmetic."""
    found = numbers(bits, 3.0, (1 << bits) - 3, 8 << max(bits - 4, 0))
    grid = levels(CODE, found)
    ties = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    (emitted,) = run_emitted(CODE, found, ties[None])
    for values in (emitted[0], CODE.values(CODE.codes(ties, found), found)):
        upper, lower = grid[1:].astype(np.float32), grid[:-1].astype(np.float32)
        assert ((values == upper) | (values == lower)).all()


def test_what_the_range_asks_for() -> None:
    """``solve`` covers both ends, with zero a level."""
    low, high = np.array([-0.17], np.float32), np.array([3.0], np.float32)
    solved = CODE.solve(low, high, 4, False, False)
    held = Numbers(4, False, solved.scale[0], solved.zero_point[0], solved.details)
    least, most = CODE.reach(held)
    assert least <= -0.17 + 1e-6
    assert most >= 3 - 1e-6
    assert CODE.misfit(held) is None
    assert CODE.misfit(numbers(zero=16)) == "a zero point is not from 0 to 15"


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("depth", [0.0, 1e-3, 0.17, 2.0, 9.0])
def test_no_more_than_the_range_asks_for(bits: int, depth: float) -> None:
    """Eight octaves to all codes, zero the level next to its place, and one end just reached."""
    solved = CODE.solve(np.float32([-depth]), np.float32([3.0]), bits, False, False)
    top = (1 << bits) - 1
    assert solved.details == {"eighths": top}
    held = Numbers(bits, False, solved.scale[0], solved.zero_point[0], solved.details)
    least, most = (float(v) for v in CODE.reach(held))
    if int(held.zero_point) == 0:  # nothing above zero: the larger end is held below it
        assert least == pytest.approx(-max(depth, 3))
    else:
        reached = [-least / (depth or 1.0), most / 3]  # least 0 where zero is the last level
        assert min(part for part in reached if part) == pytest.approx(1)
    octaves = np.log2((3 + depth) / depth) if depth else np.inf
    assert int(held.zero_point) == min(round(min(octaves * top / 8, 1e9)), top)


def test_less_noise_than_uniform_codes_behind_gelu() -> None:
    """Four bits on GELU of values with heavy tails: at least 3 dB less squared error."""
    from math import erf

    x = np.random.default_rng(0).laplace(size=20_000) - 1
    y = np.asarray(x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2, np.float32)
    log = numbers(4, float(y.max()) + 0.25, 9, 16)
    shift = -float(CODE.reach(log)[0])
    log = numbers(4, float(y.max()) + shift, 9, 16)
    plain = Uniform().solve(y.min(keepdims=True), y.max(keepdims=True), 4, False, False)
    even = Numbers(4, False, plain.scale[0], plain.zero_point[0])
    errors = [
        float(np.mean((code.values(code.codes(y, held), held) - y) ** 2))
        for code, held in ((CODE, log), (Uniform(), even))
    ]
    assert errors[1] > 2 * errors[0]
