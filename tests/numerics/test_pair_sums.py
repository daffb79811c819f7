"""Scales with which no pair of products leaves 16 bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_onnx.numerics.pair_sums import MOST, fitting, fitting_scale, pair_sums
from ptq_onnx.numerics.weights import weight_scale

FITS = np.iinfo(np.int16)


def kernel(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Rows k and k + 1 as VPMADDUBSW adds them up, before anything saturates: [pairs, N]."""
    padded = np.vstack([codes, np.zeros((len(codes) % 2, codes.shape[1]), np.int64)])
    x = np.append(x, [0] * (len(codes) % 2))
    return (x[:, None] * padded).reshape(-1, 2, codes.shape[1]).sum(axis=1)


def test_sums_of_pairs_of_one_sign() -> None:
    codes = np.array([[100, -3, 127], [40, -120, -128], [-5, 7, 90]], np.int8)
    assert pair_sums(codes).tolist() == [140, 123, 128]
    assert pair_sums(codes[:2]).tolist() == [140, 123, 128]
    assert pair_sums(np.full((2, 1), -128, np.int8)).tolist() == [256]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([1, 2, 30]))
def test_no_input_saturates(seed: int, rows: int, tail: int) -> None:
    """The worst bytes for each column stay within 16 bits, and no scale grows without need."""
    random = np.random.default_rng(seed)
    weight = random.standard_t(tail, (rows, 9)).astype(np.float32)
    plain = weight_scale(weight, 1, 8)
    scale = fitting(weight, plain)
    codes = np.rint(weight / scale).astype(np.int64)
    for column in range(codes.shape[1]):
        for sign in (1, -1):
            x = 255 * (np.sign(codes[:, column]) == sign)
            found = kernel(x.astype(np.int64), codes[:, [column]])
            assert FITS.min <= found.min() <= found.max() <= FITS.max
    before = pair_sums(np.rint(weight / plain).astype(np.int64))
    np.testing.assert_array_equal(scale[before <= MOST], plain[before <= MOST])
    grown = before > MOST
    assert (scale[grown] <= plain[grown] * (before[grown] + 2) / (MOST - 2)).all()


def test_of_a_convolution_all_have_seven_bits() -> None:
    weight = np.random.default_rng(0).normal(0, 1, (4, 3, 2, 2)).astype(np.float32)
    scale = fitting_scale(weight, 0, weight_scale(weight, 0, 8))
    codes = np.rint(weight / scale[:, None, None, None])
    assert np.abs(codes).max() == 64


@pytest.mark.parametrize("axis", [None, 0])
def test_rows_that_are_not_known_to_meet(axis: int | None) -> None:
    weight = np.random.default_rng(0).normal(0, 1, (6, 5)).astype(np.float32)
    scale = fitting_scale(weight, axis, weight_scale(weight, axis, 8))
    by = scale if axis is None else scale[:, None]
    assert np.abs(np.rint(weight / by)).max() == 64
