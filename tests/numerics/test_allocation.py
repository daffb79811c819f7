"""Bits for parts within a budget: the best there are, found by trying all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq_onnx.numerics.allocation import ERRORS, STEPS, allocate, expected

WIDTHS = (2, 3, 4, 6, 8)


def by_hand(noise: np.ndarray, costs: np.ndarray, budget: int) -> float:
    """The least noise, by every choice there is."""
    parts = range(len(noise))
    return min(
        sum(noise[p, c] for p, c in zip(parts, choice, strict=True))
        for choice in itertools.product(range(noise.shape[1]), repeat=len(noise))
        if sum(costs[p, c] for p, c in zip(parts, choice, strict=True)) <= budget
    )


@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(2, 8))
def test_no_choice_within_the_budget_is_better(seed: int, parts: int, mean: float) -> None:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 40, parts) * random.choice([1, 7, 64])
    noise = expected(random.lognormal(0, 3, parts), [4] * parts, WIDTHS)
    costs = sizes[:, None] * np.array(WIDTHS)
    budget = int(mean * sizes.sum() * (1 + 1e-9))
    chosen = allocate(noise, costs, budget)
    each = np.arange(parts)
    assert costs[each, chosen].sum() <= budget
    assert noise[each, chosen].sum() <= by_hand(noise, costs, budget) * (1 + 1e-12)


def test_costs_without_a_common_step_stay_within_the_budget() -> None:
    """More than ``STEPS`` steps: rounded up, so that little of the budget is left over."""
    sizes = np.array([1_000_003, 2_000_029, 777_767, 3_111_019])
    noise = expected(np.array([1.0, 3.0, 0.2, 0.9]), [4] * 4, WIDTHS)
    costs = sizes[:, None] * np.array(WIDTHS)
    budget = int(4.5 * sizes.sum())
    assert budget > 100 * STEPS
    chosen = allocate(noise, costs, budget)
    spent, lost = (a[np.arange(4), chosen].sum() for a in (costs, noise))
    assert spent <= budget
    assert lost <= by_hand(noise, costs, int(budget * 0.999))


def test_what_is_alike_gets_alike_and_what_is_louder_more() -> None:
    noise = expected(np.array([1.0, 1.0, 50.0]), [4, 4, 4], WIDTHS)
    costs = np.tile(np.array(WIDTHS), (3, 1))
    found = allocate(noise, costs, 12)
    assert np.array(WIDTHS)[found].tolist() == [3, 3, 6]


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(ValueError, match="less than the least"):
        allocate(np.ones((2, 2)), np.array([[2, 4], [2, 4]]), 3)


def test_noise_falls_as_that_of_a_normal_variable() -> None:
    """From what was measured in its own width; 2^b levels of the best step, found by trying."""
    x = np.random.default_rng(0).standard_normal(40_000)
    for bits in (2, 3, 4):
        top = (1 << bits) - 1
        steps = np.linspace(0.05, 1.5, 120)
        levels = [(np.clip(np.floor(x / s) + 0.5, -top / 2, top / 2)) * s for s in steps]
        least = min(float(np.mean((x - v) ** 2)) for v in levels)
        assert ERRORS[bits] == pytest.approx(least, rel=0.03)
    found = expected(np.array([2.0, 5.0]), [4, 8], (2, 4, 8))
    np.testing.assert_allclose(found[0] / 2, np.array([ERRORS[b] for b in (2, 4, 8)]) / ERRORS[4])
    assert found[1, 2] == pytest.approx(5.0)
