"""An orthogonal matrix for a stream, learned by what rounding behind its norms costs the output.

Codes of a few bits, each channel c of x R [.., D] with a range of its own, leave an error of about
the square of that range: for it stands the root of the fourth moment, more than the variance and
less than the largest value, which a search clips. With C = E[g gᵀ], g the output's gradient by x,
the output loses about

    J(R) = Σ_t Σ_c (E (x_t R)_c⁴)^½ (Rᵀ C_t R)_cc

over the tensors t of the stream. Weights lose as much again: their rows are scaled with the ranges.

J falls along the gradient in the group of orthogonal matrices with R·1 = 1, so that
LayerNormalization still commutes with R: the step is R ← R (1 - S/2)⁻¹ (1 + S/2), S skew with
S·1 = 0 (Cayley's transform, which keeps both). Sources: Li et al., "Efficient Riemannian
Optimization on the Stiefel Manifold via the Cayley Transform" (arXiv 2002.01113), for such steps;
SpinQuant (arXiv 2405.16406), which learns rotations of language models by them. The measure and
R·1 = 1 are this project's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Double = NDArray[np.float64]

STEPS = 100
"""At most …"""
LEAST_STEPS = 20
WORK = 5e12
"""… and as many as take so many multiplications, T D³ in a step, but ``LEAST_STEPS``."""
BATCH = 256
"""Rows of each tensor in a step."""
RATE = 0.02
"""Of the first step, in radians for an entry; it falls to zero."""
MOMENTUM, DECAY = 0.9, 0.99
TINY = 1e-30


def expected_loss(rows: Array, costs: Array, matrix: Array) -> float:
    """J(R) of rows [T, N, D] of T tensors, their costs [T, D, D] and a matrix R [D, D]."""
    found, _ = _loss(_centred(rows), costs.astype(np.float32), matrix.astype(np.float32))
    return found


def steps_for(tensors: int, width: int) -> int:
    """How many steps are made for a stream."""
    return int(np.clip(WORK / (tensors * width**3), LEAST_STEPS, STEPS))


def learned_matrix(
    rows: Array, costs: Array, seed: int = 0, tell: Callable[[float], None] = lambda _: None
) -> Double:
    """R [D, D], orthogonal with R·1 = 1, from rows [T, N, D] and costs [T, D, D]; ``tell`` is told
    the part that is done, at each step."""
    random = np.random.default_rng(seed)
    steps = steps_for(len(rows), rows.shape[-1])
    rows, costs = _centred(rows), costs.astype(np.float32)
    width = rows.shape[-1]
    one = np.eye(width)
    matrix, mean, power = one.copy(), np.zeros((width, width)), 0.0
    for step in range(steps):
        drawn = rows[:, random.permutation(rows.shape[1])[:BATCH]]
        loss, slope = _loss(drawn, costs, matrix.astype(np.float32))
        turn = matrix.T @ (slope.astype(np.float64) / max(loss, TINY))
        turn = _without_mean(turn - turn.T)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * turn
        power = DECAY * power + (1 - DECAY) * float(np.mean(turn**2))
        size = np.sqrt(power / (1 - DECAY ** (step + 1))) * (1 - MOMENTUM ** (step + 1))
        half = mean * (-RATE / 2 * (1 - step / steps) / max(float(size), TINY))
        matrix = matrix @ np.linalg.solve(one - half, one + half)
        tell((step + 1) / steps)
    return matrix


def _loss(rows: Array, costs: Array, matrix: Array) -> tuple[float, Array]:
    """J(R) and its gradient by R [D, D]."""
    turned = rows @ matrix
    fourth = (turned**4).mean(axis=1)
    error = np.sqrt(fourth)
    behind = costs @ matrix
    cost = (matrix * behind).sum(axis=1)
    by_turned = turned**3 * (2 / rows.shape[1] * cost / np.maximum(error, TINY))[:, None]
    slope = (rows.transpose(0, 2, 1) @ by_turned).sum(axis=0)
    slope += 2 * (behind * error[:, None]).sum(axis=0)
    return float(np.sum(error * cost, dtype=np.float64)), slope


def _centred(rows: Array) -> Array:
    """Rows less their mean, from which a channel's range is measured."""
    rows = rows.astype(np.float32)
    return np.asarray(rows - rows.mean(axis=1, keepdims=True), np.float32)


def _without_mean(turn: Double) -> Double:
    """The part of a skew matrix S with S·1 = 0."""
    across = turn.mean(axis=0)
    return np.asarray(turn - across - turn.mean(axis=1)[:, None] + across.mean(), np.float64)
