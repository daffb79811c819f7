"""The correlation against float64 by hand; samples of rows and pairs against their streams."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_onnx.calibration.pearson import correlation
from ptq_onnx.calibration.product_samples import EXTREME, PAIRS, ROWS, USUAL, PairSample, RowSample


def by_hand(output: np.ndarray, candidate: np.ndarray, weight: np.ndarray) -> float:
    """The formula of the paper in float64, rows written as often as they count."""
    times = weight.astype(int)
    o = np.repeat(output.astype(np.float64), times, axis=-2).ravel()
    c = np.repeat(candidate.astype(np.float64), times, axis=-2).ravel()
    do, dc = o - o.mean(), c - c.mean()
    return float((do * dc).sum() / np.sqrt((do**2).sum() * (dc**2).sum()))


@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5)])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_correlation_is_the_formula(shape: tuple[int, ...], offset: float) -> None:
    random = np.random.default_rng(0)
    output = (random.normal(size=shape) + offset).astype(np.float32)
    noise = random.normal(size=(4, *shape)) * np.array([0.01, 0.1, 1, 10]).reshape(
        4, *[1] * len(shape)
    )
    candidates = (output + noise).astype(np.float32)
    weight = np.array([1.0, 4, 1, 2, 9, 1, 3])
    found = correlation(output, candidates, weight)
    expected = [by_hand(output, c, weight) for c in candidates]
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert np.all(np.diff(found) < 0)


def test_correlation_sees_neither_factor_nor_offset() -> None:
    output = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    weight = np.ones(6)
    candidates = np.stack([output, 3 * output, output + 5, -output])
    np.testing.assert_allclose(correlation(output, candidates, weight), [1, 1, 1, -1], rtol=1e-5)


def test_a_constant_output_has_no_correlation() -> None:
    ones, weight = np.ones((3, 2), np.float32), np.ones(3)
    varied = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert correlation(ones, varied[None], weight) == 0
    assert correlation(varied, np.zeros((1, 3, 2), np.float32), weight) == 0


def test_rows_keep_the_extremes_and_stand_for_all() -> None:
    random = np.random.default_rng(2)
    rows = random.normal(size=(5000, 6)).astype(np.float32)
    rows[4321] *= 100
    sample = RowSample(6)
    for part in np.array_split(rows, 11):
        sample.add(part)
    assert sample.rows.shape == (EXTREME + USUAL, 6)
    size = np.abs(rows).max(axis=1)
    np.testing.assert_array_equal(
        np.sort(np.abs(sample.rows[:EXTREME]).max(axis=1)), np.sort(size)[-EXTREME:]
    )
    assert sample.weight.sum() == pytest.approx(5000)
    assert {tuple(r) for r in sample.rows} <= {tuple(r) for r in rows}
    power = sample.weight @ (sample.rows.astype(np.float64) ** 2)
    np.testing.assert_allclose(power, (rows.astype(np.float64) ** 2).sum(axis=0), rtol=0.25)


def test_all_of_few_rows_are_kept() -> None:
    rows = np.arange(20, dtype=np.float32).reshape(10, 2)
    sample = RowSample(2)
    sample.add(rows[:4])
    sample.add(rows[4:])
    np.testing.assert_array_equal(np.sort(sample.rows, axis=0), rows)
    np.testing.assert_array_equal(sample.weight, 1)


def test_the_size_of_a_row_is_over_its_factor() -> None:
    rows = np.ones((EXTREME + USUAL + 500, 2), np.float32)
    rows[3, 0], rows[7, 1] = 50, 5
    sample = RowSample(2)
    sample.add(rows, np.array([100.0, 0.01], np.float32))
    assert sample.rows[0].tolist() == [1, 5]


def test_pairs_stay_together_and_are_few() -> None:
    """Each product carries a number of its own in both factors."""
    sample = PairSample()
    for start in range(0, 96, 8):
        number = np.arange(start, start + 8, dtype=np.float32).reshape(4, 2, 1, 1)
        sample.add(np.ones((4, 2, 100, 3), np.float32) * number, number * np.ones((3, 5)))
    first, second = sample.factors
    assert first.shape == (PAIRS, ROWS, 3)
    assert second.shape == (PAIRS, 3, 5)
    np.testing.assert_array_equal(first[:, 0, 0], second[:, 0, 0])
    assert len(set(first[:, 0, 0])) == PAIRS
    assert first[:, 0, 0].max() > 50
    heads = [place[1] for place in sample.places]
    np.testing.assert_array_equal(heads, first[:, 0, 0] % 2)


@pytest.mark.parametrize("size", [1, 3, 12])
def test_samples_do_not_depend_on_the_batch(size: int) -> None:
    """What is drawn goes by an image's place among all, however they are cut in batches."""
    random = np.random.default_rng(0)
    first = random.normal(size=(12, 4, 9, 5)).astype(np.float32)
    second = random.normal(size=(12, 4, 5, 9)).astype(np.float32)
    rows = random.normal(size=(12, 80, 6)).astype(np.float32)
    pairs, whole = PairSample(), PairSample()
    some, every = RowSample(6), RowSample(6)
    whole.add(first, second)
    every.add(rows.reshape(-1, 6))
    for start in range(0, 12, size):
        part = slice(start, start + size)
        pairs.add(first[part], second[part])
        some.add(rows[part].reshape(-1, 6))
    for one, other in zip(pairs.factors, whole.factors, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(some.rows, every.rows)
    np.testing.assert_array_equal(some.weight, every.weight)
