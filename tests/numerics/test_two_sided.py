"""Codes by what their errors cost behind the linear: a better loss, and none left alone."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_onnx.numerics.multiples import (
    improved_in_blocks,
    rounded_in_blocks,
    steps_of,
)
from ptq_onnx.numerics.two_sided import DAMPING, output_loss, steadied, two_sided

K, N = 40, 12


def drawn(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight, H of correlated rows, and C with few directions that cost most."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((K, N)).astype(np.float32)
    rows = random.standard_normal((200, K)) @ (np.eye(K) + 0.3 * random.standard_normal((K, K)))
    roots = random.standard_normal((N, 3)) @ random.standard_normal((3, N)) + 0.3 * np.eye(N)
    return weight, rows.T @ rows / 200, roots @ roots.T


def test_loss_is_the_trace() -> None:
    weight, moments, costs = drawn()
    scale, codes = np.full((K, N), 0.5, np.float32), np.rint(weight / 0.5).astype(np.int8)
    error = codes * 0.5 - weight
    exact = np.trace(error.T @ moments @ error @ costs)
    assert output_loss(weight, scale, moments, costs, codes) == pytest.approx(exact, rel=1e-9)


def test_no_code_alone_lowers_the_loss_that_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq_onnx.numerics.two_sided.PASSES", 100)
    weight, moments, costs = drawn()
    scale = np.broadcast_to(np.linspace(0.3, 0.6, N), (K, N))
    ends = np.full((K, N), -4), np.full((K, N), 3)
    start = np.clip(np.rint(weight / scale), -4, 3).astype(np.int8)
    found = two_sided(weight, scale, moments, costs, start, ends)
    before, after = (output_loss(weight, scale, moments, costs, c) for c in (start, found))
    assert after < 0.6 * before
    assert found.min() >= -4
    assert found.max() <= 3
    for k, n in np.ndindex(K, N):
        for step in (-1, 1):
            other = found.copy()
            other[k, n] += step
            if -4 <= other[k, n] <= 3:
                assert output_loss(weight, scale, moments, costs, other) >= after * (1 - 1e-9)


def test_columns_that_cost_apart_are_left_as_descent_leaves_them() -> None:
    """With C diagonal columns do not see each other, whatever each of them costs."""
    weight, moments, _ = drawn()
    scale = np.full((K, N), 0.4)
    ends = np.full((K, N), -8), np.full((K, N), 7)
    start = np.clip(np.rint(weight / scale), -8, 7).astype(np.int8)
    one, other = (
        two_sided(weight, scale, moments, np.diag(cost), start, ends)
        for cost in (np.ones(N), np.linspace(1, 3, N))
    )
    alone = np.concatenate(
        [
            two_sided(
                weight[:, [n]], scale[:, [n]], moments, np.eye(1), start[:, [n]],
                (ends[0][:, [n]], ends[1][:, [n]]),
            )
            for n in range(N)
        ],
        axis=1,
    )  # fmt: skip
    np.testing.assert_array_equal(one, alone)
    np.testing.assert_array_equal(other, alone)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_blocks_keep_their_steps_and_their_room(bits: int) -> None:
    weight, moments, costs = drawn()
    found = rounded_in_blocks(weight, moments, bits)
    better = improved_in_blocks(weight, found, moments, costs, bits)
    np.testing.assert_array_equal(better.step, found.step)
    np.testing.assert_array_equal(better.order, found.order)
    before, after = (
        output_loss(weight, np.broadcast_to(f.step, (K, N)), moments, costs, f.codes)
        for f in (found, better)
    )
    assert after < 0.95 * before
    parts = steps_of(found.codes, found.order, bits)
    assert parts is not None
    factor, low, high = parts
    assert not np.any(better.codes % factor)
    assert np.all(better.codes >= low * factor)
    assert np.all(better.codes <= high * factor)


def test_costs_of_few_rows_are_nearer_to_their_diagonal() -> None:
    _, _, costs = drawn()
    power = np.diag(costs)
    many, few = steadied(costs, 1e12), steadied(costs, N)
    np.testing.assert_allclose(many, costs + DAMPING * power.mean() * np.eye(N), atol=1e-9)
    np.testing.assert_allclose(few - np.diag(np.diag(few)), (costs - np.diag(power)) / 2, atol=1e-9)
    np.testing.assert_allclose(np.diag(few), power + DAMPING * power.mean(), rtol=1e-12)
