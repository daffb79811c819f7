"""Codes of a weight by what they do to the model's output, not to the linear's own.

With Δ = scale · codes − weight [K, N], H = E[xᵀx] [K, K] of the rows that the linear reads and
C = E[g gᵀ] [N, N] of the output's gradient by what it makes, the model's output loses about

    tr(Δᵀ H Δ C)

so that columns make up for each other's errors, as rows do in GPTQ, where C counts as 1. Source:
Tseng et al., "YAQA" (arXiv 2505.22988), which rounds by both at once; here codes that GPTQ has
found are improved.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.numerics.rounding import Codes

Array = NDArray[np.float32]
Double = NDArray[np.float64]

PASSES = 3
"""Over all rows, at most."""
ROUNDS = 400
"""Of changes in a row, at most."""
TOGETHER = 0.5
"""Part of the best gain from which on codes are changed in one round."""
LEAST = 1e-12
"""Of the loss at first: a smaller gain is none."""
DAMPING = 1.0
"""Of C's mean diagonal, added to it."""


def output_loss(
    weight: Array, scale: Array | Double, moments: Double, costs: Double, codes: Codes
) -> float:
    """tr(Δᵀ H Δ C)."""
    error = codes * np.asarray(scale, np.float64) - weight
    return float(np.sum((moments @ error) * (error @ costs)))


def steadied(costs: Double, rows: float) -> Double:
    """C from gradients worth so many ``rows``, nearer to its diagonal and to 1: (1 − ρ) C +
    ρ diag(C), ρ = N / (N + rows), and ``DAMPING``. C of few rows knows of directions that cost
    nothing, into which all errors would go; other images do see them."""
    part = len(costs) / (len(costs) + max(rows, 1.0))
    power = np.diag(costs)
    found = (1 - part) * costs
    np.fill_diagonal(found, power + DAMPING * power.mean())
    return found


def two_sided(
    weight: Array,
    scale: Array | Double,
    moments: Double,
    costs: Double,
    codes: Codes,
    ends: tuple[NDArray[np.integer], NDArray[np.integer]],
) -> Codes:
    """Codes [K, N] none of which can be changed alone for a smaller loss, or as near to that as
    ``PASSES`` come, from ``codes``; ``scale`` and the ``ends`` that codes may have are [K, N].

    Row after row, those with the largest power first: the codes whose change gains most are changed
    together, or the best one alone where together they gain less.
    """
    steps = np.asarray(scale, np.float64)
    lowest, highest = (end.astype(np.float64) for end in ends)
    found = codes.astype(np.float64)
    error = found * steps - weight
    slope = moments @ error
    power, cost = np.diag(moments), np.diag(costs)
    least = LEAST * abs(float(np.sum(slope * (error @ costs))))
    read = [k for k in np.argsort(-power, kind="stable") if power[k] > LEAST * power.max()]
    for _ in range(PASSES):
        changed = False
        for k in read:
            before = found[k].copy()
            pull, bend = slope[k] @ costs, power[k] * cost * steps[k] ** 2
            for _ in range(ROUNDS):
                change = np.clip(
                    np.rint(-pull * steps[k] / np.maximum(bend, 1e-300)),
                    lowest[k] - found[k],
                    highest[k] - found[k],
                )
                gain = -(2 * change * steps[k] * pull + bend * change**2)
                best = int(gain.argmax())
                if not gain[best] > least:
                    break
                taken = np.flatnonzero(gain >= TOGETHER * gain[best])
                move = change[taken] * steps[k][taken]
                more = power[k] * (costs[:, taken] @ move)
                together = -(2 * move @ pull[taken] + move @ more[taken])
                if together < gain[best]:
                    taken = np.array([best])
                    more = power[k] * costs[:, best] * (change[best] * steps[k][best])
                found[k, taken] += change[taken]
                pull = pull + more
            moved = np.flatnonzero(found[k] != before)
            if len(moved):
                slope[:, moved] += moments[:, k, None] * ((found[k] - before) * steps[k])[moved]
                changed = True
        if not changed:
            break
    return found.astype(np.int8)
