"""Weights in blocks of rows, whose steps are whole multiples of their column's."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from ptq_onnx.equalization.factor_search import MULTIPLES, Product
from ptq_onnx.numerics.codes.multiples import LARGEST, NARROW
from ptq_onnx.numerics.multiples import (
    MOST,
    ROWS,
    Multiples,
    blocks_of,
    rounded_in_blocks,
    steps_of,
)
from ptq_onnx.numerics.rounding import gptq_ranged, loss


def drawn(rows: int = 70, columns: int = 12, spread: float = 20.0) -> NDArray[np.float32]:
    """A weight [K, N] whose rows differ in size."""
    random = np.random.default_rng(rows)
    size = random.permutation(np.geomspace(1, spread, rows))
    return np.asarray(random.normal(size=(rows, columns)) * size[:, None], np.float32)


def moments(rows: int = 70) -> NDArray[np.float64]:
    x = np.random.default_rng(1).normal(size=(4 * rows, rows)) @ np.diag(np.linspace(0.3, 2, rows))
    return np.asarray(x.T @ x / len(x))


def values(found: Multiples) -> NDArray[np.float64]:
    return found.codes * found.step.astype(np.float64)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("largest", [LARGEST, NARROW])
def test_codes_are_few_multiples_in_every_block(bits: int, largest: int) -> None:
    weight = drawn()
    found = rounded_in_blocks(weight, moments(), bits, largest)
    assert np.abs(found.codes.astype(int)).max() <= largest
    size = np.square(weight[found.order], dtype=np.float64).sum(axis=1)
    assert (np.diff(size) <= 0).all()
    held = blocks_of(found.codes, found.order, bits)
    assert held is not None
    assert held.codes.min() >= 0
    assert held.codes.max() < 1 << bits
    assert held.zero.min() >= 0
    assert held.zero.max() < 1 << bits
    assert held.factor.min() >= 1
    assert held.factor.max() <= MOST
    assert held.factor.shape == (-(-70 // ROWS), 12)
    np.testing.assert_array_equal(held.values[:70], found.codes[found.order])
    assert not held.values[70:].any()


@pytest.mark.parametrize(("bits", "gain"), [(4, 0.55), (3, 0.6), (2, 0.85)])
def test_they_lose_less_than_a_step_for_each_column(bits: int, gain: float) -> None:
    """By the error of the output, where rows differ twentyfold in size."""
    weight, seen = drawn(), moments()
    found = rounded_in_blocks(weight, seen, bits)
    step, zero, codes = gptq_ranged(weight, seen, bits)
    before, after = (
        loss(weight, scale, seen, c).sum()
        for scale, c in ((step, codes), (found.step, found.codes))
    )
    assert zero.shape == step.shape == (12,)
    assert after < gain * before


def test_rows_of_one_size_are_rounded_within_half_a_step() -> None:
    """No range is shrunk and nothing is passed on where every level is used: the grid itself."""
    weight = np.tile(np.arange(-8, 8, dtype=np.float32)[:, None], (2, 3)) * np.float32([1, 0.5, 3])
    found = rounded_in_blocks(weight, np.eye(32), 4)
    np.testing.assert_allclose(values(found), weight, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 80), st.integers(2, 4))
def test_any_blocks_are_found_again(seed: int, rows: int, bits: int) -> None:
    """Codes made of any factors, zero points and order are held by some that make the same."""
    random = np.random.default_rng(seed)
    blocks, columns, top = -(-rows // ROWS), 5, (1 << bits) - 1
    zero = random.integers(0, top + 1, (blocks, columns))
    factor = np.minimum(random.integers(1, 16, zero.shape), LARGEST // np.maximum(zero, top - zero))
    q = random.integers(0, top + 1, (blocks * ROWS, columns))
    ordered = (np.repeat(factor, ROWS, 0) * (q - np.repeat(zero, ROWS, 0)))[:rows]
    order = random.permutation(rows)
    codes = np.empty((rows, columns), np.int8)
    codes[order] = ordered
    held = blocks_of(codes, order, bits)
    assert held is not None
    np.testing.assert_array_equal(held.values[:rows], ordered)
    assert held.codes.max() <= top
    assert held.codes.min() >= 0


def test_other_codes_are_not_held_so() -> None:
    """Neighbours that are no multiples of one number, and more levels than the bits have."""
    codes = np.zeros((32, 2), np.int8)
    codes[:2, 1] = 101, 100
    assert blocks_of(codes, np.arange(32), 4) is None
    codes[:2, 1] = 15, 0
    assert blocks_of(codes, np.arange(32), 4) is not None
    assert blocks_of(codes, np.arange(32), 3) is not None  # as 1 · 15
    codes[:2, 1] = 15, 1
    assert blocks_of(codes, np.arange(32), 3) is None


@pytest.mark.parametrize("largest", [LARGEST, NARROW])
def test_what_training_may_choose_stays_in_range(largest: int) -> None:
    found = rounded_in_blocks(drawn(), moments(), 4, largest)
    steps = steps_of(found.codes, found.order, 4)
    assert steps is not None
    factor, low, high = steps
    small = found.codes // factor
    np.testing.assert_array_equal(small * factor, found.codes)
    assert (low <= small).all()
    assert (small <= high).all()
    assert max(np.abs(low * factor).max(), np.abs(high * factor).max()) <= largest
    for end in (low, high):
        assert blocks_of((end * factor).astype(np.int8), found.order, 4) is not None


def test_a_factor_costs_a_weight_in_blocks_little() -> None:
    """Σ s² p by hand: blocks of rows by their size, and as much as 7 bits for the column."""
    magnitude = np.abs(drawn(40, 3))
    factor = np.geomspace(1, 30, 40).astype(np.float32)
    power = np.linspace(1, 2, 40)
    order = np.argsort(-factor * np.sqrt((magnitude.astype(np.float64) ** 2).sum(axis=1)))
    scaled = (magnitude * factor[:, None])[order].astype(np.float64)
    expected = 0.0
    for start in (0, 32):
        steps = scaled[start : start + 32].max(axis=0) / 7
        more = scaled.max(axis=0) / MULTIPLES
        expected += (steps**2 + more**2).sum() * power[order][start : start + 32].sum()
    assert Product(magnitude, 4, 32).noise(factor, power) == pytest.approx(expected, rel=1e-5)
    whole = (scaled.max(axis=0) / 7) ** 2
    assert Product(magnitude, 4).noise(factor, power) == pytest.approx(
        whole.sum() * power.sum(), rel=1e-5
    )
