"""The learned matrix is orthogonal, keeps the mean, and goes down the slope that torch has too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptq_onnx.numerics.learned_rotation import _loss, expected_loss, learned_matrix, steps_for
from ptq_onnx.numerics.rotations import spreading

TENSORS, ROWS, D = 3, 600, 12


def drawn(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows without mean, one channel of them often massive; costs that are low there."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((TENSORS, ROWS, D))
    rows[..., 4] *= 9 * (random.random((TENSORS, ROWS)) < 0.2)
    rows -= rows.mean(axis=-1, keepdims=True)
    roots = random.standard_normal((TENSORS, D, D))
    return rows.astype(np.float32), (roots @ roots.transpose(0, 2, 1)).astype(np.float32)


def exact(rows: torch.Tensor, costs: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """J in float64, as the formula says, tensor by tensor and channel by channel."""
    total = torch.zeros((), dtype=torch.float64)
    for one, cost in zip(rows, costs, strict=True):
        for c in range(D):
            turned = (one - one.mean(dim=0)) @ matrix[:, c]
            total = total + (turned**4).mean().sqrt() * (matrix[:, c] @ cost @ matrix[:, c])
    return total


def test_loss_and_slope_are_those_of_the_formula() -> None:
    rows, costs = drawn()
    matrix = spreading(D, 3)
    free = torch.tensor(matrix, requires_grad=True)
    loss = exact(torch.tensor(rows).double(), torch.tensor(costs).double(), free)
    loss.backward()
    loss = loss.detach()
    assert expected_loss(rows, costs, matrix) == pytest.approx(float(loss), rel=1e-5)
    centred = rows - rows.mean(axis=1, keepdims=True)
    found, slope = _loss(centred, costs, matrix.astype(np.float32))
    assert found == pytest.approx(float(loss), rel=1e-5)
    assert free.grad is not None
    size = float(free.grad.abs().max())
    np.testing.assert_allclose(slope, free.grad.numpy(), atol=2e-5 * size)


def test_it_is_orthogonal_and_keeps_the_mean() -> None:
    matrix = learned_matrix(*drawn())
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(D), atol=1e-12)
    np.testing.assert_allclose(matrix.sum(axis=1), np.ones(D), atol=1e-12)


def test_it_loses_less_on_rows_that_it_has_not_seen() -> None:
    """Rows and costs of one kind: less than as they are, and than spread evenly."""
    rows, costs = drawn()
    matrix = learned_matrix(rows[:, : ROWS // 2], costs)
    seen, none, even = (
        expected_loss(rows[:, ROWS // 2 :], costs, r) for r in (matrix, np.eye(D), spreading(D, 0))
    )
    assert seen < 0.8 * none
    assert seen < 0.8 * even


def test_what_costs_nothing_is_left_alone() -> None:
    rows, costs = drawn()
    np.testing.assert_array_equal(learned_matrix(rows, 0 * costs), np.eye(D))


def test_the_seed_alone_decides() -> None:
    rows, costs = drawn()
    np.testing.assert_array_equal(learned_matrix(rows, costs), learned_matrix(rows, costs))


def test_wide_streams_make_fewer_steps() -> None:
    """ViT-L 95, ViT-g 20, ViT-B all; the caller is told of each."""
    assert [steps_for(49, 1024), steps_for(81, 1536), steps_for(25, 768)] == [95, 20, 100]
    told: list[float] = []
    learned_matrix(*drawn(), tell=told.append)
    assert told[-1] == 1
    assert len(told) == steps_for(TENSORS, D) == 100
