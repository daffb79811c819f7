"""Scales of weights: symmetric, per tensor or per output channel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.numerics.codes.code import TINY

Array = NDArray[np.float32]
SHRINK = np.linspace(1.0, 0.4, 25)
SEARCHED_BELOW = 8
"""From 8 bits on nothing is clipped; below, the clip range with the least error is taken."""


def weight_scale(
    weight: Array,
    axis: int | None,
    bits: int,
    largest: int | None = None,
    power: NDArray[np.float64] | None = None,
) -> Array:
    """Scale per slice along ``axis`` ([N]), or one ([]) for None.

    max |w| / ``largest`` (of b bits: 2^(b-1) - 1), at least ``TINY``; below 8 bits
    shrunk to the least Σ p (w - ŵ)², p being ``power`` along the other axis, or one.
    """
    rows = weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0)
    rows = rows.reshape(len(rows), -1).astype(np.float64)
    counts = np.ones(1) if power is None else power
    largest = (1 << (bits - 1)) - 1 if largest is None else largest
    full = np.maximum(np.abs(rows).max(axis=1, initial=0) / largest, TINY)
    scale = full.astype(np.float32)
    if bits < SEARCHED_BELOW:
        least = np.full(len(rows), np.inf)
        for shrink in SHRINK:
            # Judged as it is stored: a float64 scale may win by less than its rounding loses
            tried = (full * shrink).astype(np.float32)
            step = tried[:, None].astype(np.float64)
            codes = np.clip(np.rint(rows / step), -largest - 1, largest)
            error = (counts * (codes * step - rows) ** 2).sum(axis=1)
            scale = np.where(error < least, tried, scale)
            least = np.minimum(error, least)
    return np.asarray(scale[0] if axis is None else scale, np.float32)
