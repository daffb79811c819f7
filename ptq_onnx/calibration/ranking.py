"""Attention logits that keep their order, in place of their values.

A softmax passes on which keys a query prefers: what quantized factors of QKᵀ make of a row is
scored by the correlation with the float row, less ``WEIGHT`` times how far pairs of its logits
come near to, or change, their order,

    mean over pairs of max(THRESHOLD σ - (Ôᵢ - Ôⱼ) sign(Oᵢ - Oⱼ), 0) / σ,

σ being the standard deviation of all O, so that it has no unit. Source: Liu et al.,
"Post-Training Quantization for Vision Transformer" (NeurIPS 2021, arXiv 2106.14156), section 3.3;
``WEIGHT`` and ``THRESHOLD`` are their γ and θ. Of a row's pairs those ``APART`` places from each
other are looked at.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.calibration.pearson import correlation

Array = NDArray[np.float32]
Double = NDArray[np.float64]

WEIGHT, THRESHOLD = 0.5, 0.2
APART = (1, 2, 5, 11, 23, 47, 71, 97)
"""Places between the keys of a pair, around the end of the row."""


def ranked_correlation(output: Array, candidates: Array, weight: Double) -> Double:
    """ρ of ``output`` [..., R, N] with each of the ``candidates`` [C, ..., R, N], less the ranking
    loss, [C]. Row r counts ``weight`` [R] times."""
    return correlation(output, candidates, weight) - WEIGHT * ranking_loss(
        output, candidates, weight
    )


def ranking_loss(output: Array, candidates: Array, weight: Double) -> Double:
    """The mean over pairs of each candidate, [C]; 0 where all logits are the same, or each row has
    one. Shapes as above."""
    exact = output.reshape(-1, *output.shape[-2:])
    found = candidates.reshape(len(candidates), *exact.shape)
    spread, keys = float(exact.std(dtype=np.float64)), exact.shape[-1]
    apart = sorted({places % keys for places in APART} - {0})
    total = np.zeros(len(found))
    if spread == 0 or not apart:
        return total
    least = np.float32(THRESHOLD * spread)
    for places in apart:
        sign = np.sign(exact - np.roll(exact, places, axis=-1))
        kept = (found - np.roll(found, places, axis=-1)) * sign
        lost = np.maximum(least - kept, 0) * np.abs(sign)
        total += lost.sum(axis=-1, dtype=np.float64).sum(axis=1) @ weight
    pairs = float(weight.sum()) * exact.shape[0] * keys * len(apart)
    return np.asarray(total / (spread * pairs), np.float64)
