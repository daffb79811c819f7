"""How many bits each part gets, so that the least noise is expected for what all may cost.

Parts are quantized independently of one another, so that their noise adds up; it falls with their
bits as that of a normal variable does. What remains is an integer programme, one choice for each
part within a budget, which is solved exactly over costs in whole steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Double = NDArray[np.float64]

ERRORS = {
    2: 0.11885, 3: 0.03744, 4: 0.01154, 5: 3.495e-3, 6: 1.041e-3, 7: 3.04e-4, 8: 8.77e-5,
}  # fmt: skip
"""Mean squared error of a normal variable of variance 1 in 2^b uniform levels whose step is the
best (Max, "Quantizing for Minimum Distortion", 1960)."""
STEPS = 20_000
"""The budget in steps, at most; costs are rounded up to whole ones."""


def allocate(noise: Double, costs: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """The choice of each part, [M], with the least sum of ``noise`` [M, B] whose ``costs`` [M, B]
    are at most ``budget`` together.

    Exact where the costs are multiples of budget / ``STEPS`` or have such a divisor. Raises
    ValueError where even the least costs are more than the budget.
    """
    if costs.min(axis=1).sum() > budget:
        raise ValueError("the budget is less than the least costs")
    floor = costs.min(axis=1, keepdims=True)  # what everyone needs is not searched
    extra, left = costs - floor, budget - int(floor.sum())
    step = max(math.gcd(*map(int, extra.ravel())), 1)
    step *= max(1, math.ceil(left / step / STEPS))
    units, room = -(-extra // step), left // step
    best = np.zeros(room + 1)
    chosen = np.zeros((len(noise), room + 1), np.int16)
    for part, (own, sizes) in enumerate(zip(noise, units, strict=True)):
        tried = np.full((len(own), room + 1), np.inf)
        for index, (lost, size) in enumerate(zip(own, sizes, strict=True)):
            if size <= room:
                tried[index, size:] = best[: room + 1 - size] + lost
        chosen[part] = tried.argmin(axis=0)
        best = tried.min(axis=0)
    found, at = np.zeros(len(noise), np.int64), room
    for part in reversed(range(len(noise))):
        found[part] = chosen[part, at]
        at -= units[part, found[part]]
    return found


def expected(noise: Double, bits: Sequence[int], widths: Sequence[int]) -> Double:
    """The noise [M, B] of parts in each of ``widths``, from that which they have in ``bits``."""
    errors = np.array([ERRORS[width] for width in widths])
    return np.asarray(noise[:, None] * errors / np.array([ERRORS[b] for b in bits])[:, None])
