"""Products of vectors between runs of a model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Σ a b of [N] and [N]. Not by BLAS: its threads would wait for more of it, on the cores that
    the model runs on (63.8 in place of 51.1 s for the analysis of modules on two)."""
    return float(np.einsum("i,i->", a, b))
