"""Grids of blocks of rows: a scale and zero point for ``BLOCK`` rows of a weight's column.

Per block the range is shrunk to the least Σ_k p_k (w - ŵ)², p_k = E[x_k²] of the input: the mean
squared error of the output, were the channels independent. Then the scale is fitted to the codes
by least squares, s = Σ p w c / Σ p c², c being codes less zero point.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.numerics.codes.code import TINY

Array = NDArray[np.float32]
Double = NDArray[np.float64]

BLOCK = 32
"""Rows that share a scale; the last block of a column may have fewer."""
SHRINK = np.linspace(1.0, 0.6, 17)
FITS = 2
"""How often scales are fitted and codes found anew."""


def block_grid(
    weight: Array, bits: int, power: Double | None = None, size: int = BLOCK
) -> tuple[Array, NDArray[np.int32]]:
    """Scale and zero point per block of a weight [K, N], [⌈K / size⌉, N] each; codes 0 … 2^b - 1.

    ``power`` [K] weighs the rows.
    """
    blocks, shares = in_blocks(weight, power, size)
    low = np.minimum(blocks.min(axis=1, keepdims=True), 0)
    high = np.maximum(blocks.max(axis=1, keepdims=True), 0)
    best = _found(blocks, shares, low, high, bits)
    for shrink in SHRINK[1:]:
        best = _better(best, _found(blocks, shares, low * shrink, high * shrink, bits))
    for _ in range(FITS):
        _, scale, zero = best
        codes = np.clip(np.rint(blocks / scale) + zero, 0, (1 << bits) - 1) - zero
        own = np.sum(shares * codes**2, axis=1, keepdims=True)
        shared = np.sum(shares * codes * blocks, axis=1, keepdims=True)
        fitted = np.where((own > 0) & (shared > 0), shared / np.where(own > 0, own, 1), scale)
        fitted = _stored(np.maximum(fitted, TINY))
        best = _better(best, (_error(blocks, shares, fitted, zero, bits), fitted, zero))
    _, scale, zero = best
    return np.asarray(scale[:, 0], np.float32), np.asarray(zero[:, 0], np.int32)


def in_blocks(weight: Array, power: Double | None, size: int) -> tuple[Double, Double]:
    """A weight [K, N] in blocks of rows [B, size, N], zeros behind the last, and what each row
    counts, [B, size, 1]."""
    rows, columns = weight.shape
    missing = -rows % size
    padded = np.pad(weight.astype(np.float64), ((0, missing), (0, 0)))
    shares = np.ones(rows) if power is None else np.maximum(power, 0)
    # A block of channels without any input counts as if all were alike.
    shares = np.pad(shares, (0, missing)).reshape(-1, size, 1)
    shares = np.where(shares.sum(axis=1, keepdims=True) > 0, shares, 1.0)
    return padded.reshape(-1, size, columns), shares


def block_errors(blocks: Double, shares: Double, scale: Double, zero: Double, bits: int) -> Double:
    """The weighted squared error of blocks [B, size, N] for scales and zero points [B, N]; [B,
    N]."""
    return np.asarray(_error(blocks, shares, scale[:, None], zero[:, None], bits)[:, 0])


Found = tuple[Double, Double, Double]
"""Error, scale and zero point per block, [B, 1, N] each."""


def _found(blocks: Double, shares: Double, low: Double, high: Double, bits: int) -> Found:
    top = (1 << bits) - 1
    scale = _stored(np.maximum((high - low) / top, TINY))
    zero = np.clip(np.rint(-low / scale), 0, top)
    return _error(blocks, shares, scale, zero, bits), scale, zero


def _stored(scale: Double) -> Double:
    """As the file holds it: another one would be judged by an error that nobody gets."""
    return scale.astype(np.float32).astype(np.float64)


def _error(blocks: Double, shares: Double, scale: Double, zero: Double, bits: int) -> Double:
    codes = np.clip(np.rint(blocks / scale) + zero, 0, (1 << bits) - 1) - zero
    return np.asarray(np.sum(shares * (codes * scale - blocks) ** 2, axis=1, keepdims=True))


def _better(one: Found, other: Found) -> Found:
    better = other[0] < one[0]
    return (
        np.where(better, other[0], one[0]),
        np.where(better, other[1], one[1]),
        np.where(better, other[2], one[2]),
    )
