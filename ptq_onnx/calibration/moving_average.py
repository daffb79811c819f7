"""Moving averages of rows, oldest first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

MOMENTUM = 0.99
"""Of the moving averages: what FQ-ViT's observer keeps, there of a batch, here of an image."""


def moving_average(average: Array, rows: Array, seen: int) -> Array:
    """The average [C] after ``rows`` [B, C] more, oldest first; the first of all starts it.

    As a sum: Σ (1 - m) m^(B - 1 - i) row_i + m^B average.
    """
    if seen == 0:
        average, rows = rows[0], rows[1:]
    powers = MOMENTUM ** np.arange(len(rows) - 1, -1, -1, dtype=np.float64)
    mixed = (1 - MOMENTUM) * powers @ rows.astype(np.float64) + MOMENTUM ** len(rows) * average
    return np.asarray(mixed, np.float32)
