"""Weights whose products with bytes fit the 16-bit sums of x86 CPUs without VNNI.

Their kernels multiply unsigned by signed bytes (VPMADDUBSW) and add the products of rows k and
k + 1 in 16 bits, which saturate: 255 (|w_k| + |w_k+1|) has to stay below 2^15 where both have one
sign. So the positive codes of each pair may add up to 128, the negative ones to -128. 7 bits are
enough for that (64 + 64); most columns need less room than that, as rarely two large weights of one
sign meet.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

MOST = 128
"""Σ of the codes of a pair: 255 · 128 < 2^15."""
ROUNDS = 40
LITTLE = 2.0**-10
"""By how much more a scale grows where rounding alone keeps a pair too large."""


def pair_sums(codes: NDArray[np.generic]) -> NDArray[np.int64]:
    """The largest |sum| of codes of one sign, of rows 2 k and 2 k + 1 of codes [K, N]: [N]."""
    even = codes[: len(codes) // 2 * 2].astype(np.int64).reshape(-1, 2, codes.shape[1])
    odd = codes[len(even) * 2 :].astype(np.int64)
    up, down = np.maximum(even, 0).sum(axis=1), np.maximum(-even, 0).sum(axis=1)
    found = np.concatenate([up, down, np.abs(odd)]).max(axis=0, initial=0)
    return np.asarray(found, np.int64)


def fitting(weight: Array, scale: Array) -> Array:
    """Scales [N] of a weight [K, N], as much larger as its pairs of codes need."""
    found = scale.copy()
    for _ in range(ROUNDS):
        codes = np.clip(np.rint(weight / found), -128, 127)
        over = pair_sums(codes) / MOST
        if not (over > 1).any():
            break
        found = np.where(over > 1, found * np.maximum(over, 1 + LITTLE), found)
    return np.asarray(found, np.float32)


def fitting_scale(weight: Array, axis: int | None, scale: Array) -> Array:
    """Scales along ``axis``, or one, so that no product saturates. Of a weight that is no matrix
    [K, N] it is not known which rows meet: none has more than 7 bits then."""
    if weight.ndim == 2 and axis == 1:
        return fitting(weight, scale)
    return np.asarray(scale * np.float32(127 * 2 / MOST), np.float32)
