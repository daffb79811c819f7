"""Pearson correlation of a product's output with what quantized inputs make of it.

    ρ(O, Ô) = Σ(O - Ō)(Ô - Ô̄) / √(Σ(O - Ō)² Σ(Ô - Ô̄)²)

Source: Liu et al., "Post-Training Quantization for Vision Transformer" (NeurIPS 2021, arXiv
2106.14156), section 3.2. ρ does not see a factor or an offset that all of Ô shares.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Double = NDArray[np.float64]


def correlation(output: Array, candidates: Array, weight: Double) -> Double:
    """ρ of ``output`` [..., R, N] with each of the ``candidates`` [C, ..., R, N], [C].

    Row r counts ``weight`` [R] times. Zero where either side is constant.
    """
    shape = (-1, *output.shape[-2:])
    exact = output.reshape(shape)
    found = candidates.reshape(len(candidates), *exact.shape)
    total = float(weight.sum()) * exact.shape[0] * exact.shape[2]
    middle = np.float32(_sum(exact[None], weight)[0] / max(total, 1e-300))
    # Less the mean: float32 products lose nothing to it, and sums with O need no mean of Ô.
    exact, found = exact - middle, found - middle
    power = _sum((exact * exact)[None], weight)[0]
    powers = _sum(found * found, weight) - _sum(found, weight) ** 2 / max(total, 1e-300)
    shared = _sum(found * exact, weight)
    both = np.maximum(power, 0) * np.maximum(powers, 0)
    return np.asarray(np.where(both > 0, shared / np.sqrt(np.where(both > 0, both, 1)), 0.0))


def _sum(values: Array, weight: Double) -> Double:
    """Σ over all but the first axis of values [C, U, R, N], rows weighted, [C]."""
    return np.asarray(values.sum(axis=-1, dtype=np.float64).sum(axis=1) @ weight, np.float64)
