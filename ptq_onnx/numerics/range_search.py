"""Ranges of few levels, by the squared error on a sample.

With 16 levels or less, what a range clips and how coarse it is weigh alike: covering the extremes
costs more than clipping them, and each end of a channel has an extreme of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from ptq_onnx.numerics.codes.code import TINY, Solved
from ptq_onnx.numerics.codes.logarithmic import LEAST, MOST, PARTS, level

Array = NDArray[np.float32]
Double = NDArray[np.float64]

FACTORS = tuple(float(f) for f in np.geomspace(1.0, 0.16, 14))
"""Parts of the way from a channel's mean to its extreme that an end may be at."""
ROUNDS = 2
AT_ONCE = 16
"""Channels whose sample is searched at a time: it stays in the cache."""
RATES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
"""τ of 4-bit logarithmic codes; of more bits they grow with the number of levels."""
LARGEST = tuple(float(f) for f in np.geomspace(1.0, 0.1, 20))
"""Parts of the largest value that a logarithmic range may end at."""

SEARCHED_ROWS = 512
"""Rows whose values a logarithmic range is searched on."""


def channel_bounds(rows: Array, levels: int) -> tuple[Double, Double]:
    """Lowest and highest of ``levels`` levels per channel, [C], for a sample [R, C].

    Each end is searched by itself, the other held, ``ROUNDS`` times.
    """
    low, high = np.zeros((2, rows.shape[1]))
    for start in range(0, rows.shape[1], AT_ONCE):
        part = torch.from_numpy(np.ascontiguousarray(rows[:, start : start + AT_ONCE].T))
        for bound, found in zip((low, high), _bounds(part, levels), strict=True):
            bound[start : start + AT_ONCE] = found.numpy()
    return low, high


def _bounds(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As above, of channels [C, R]."""
    middle = x.mean(dim=1)
    ends = [x.amin(dim=1) - middle, x.amax(dim=1) - middle]
    x = x - middle[:, None]
    chosen, buffer = [end.clone() for end in ends], torch.empty_like(x)
    for _ in range(ROUNDS):
        for index, end in enumerate(ends):
            least = torch.full_like(middle, np.inf)
            best = chosen[index]
            for factor in FACTORS:
                tried = [*chosen]
                tried[index] = end * factor
                error = _error(x, tried, levels, buffer)
                best = torch.where(error < least, tried[index], best)
                least = torch.minimum(error, least)
            chosen[index] = best
    return chosen[0] + middle, chosen[1] + middle


def _error(
    x: torch.Tensor, ends: list[torch.Tensor], levels: int, buffer: torch.Tensor
) -> torch.Tensor:
    """Squared error per channel of that many levels from one end to the other, [C]."""
    low, high = ends
    step = ((high - low) / (levels - 1)).clamp(min=TINY)[:, None]
    torch.sub(x, low[:, None], out=buffer)
    buffer.div_(step).round_().clamp_(0, levels - 1).mul_(step).add_(low[:, None]).sub_(x)
    return buffer.square_().sum(dim=1)


def logarithmic_range(x: Array, weight: Double, bits: int, highest: float | None = None) -> Solved:
    """M, τ and zero point of logarithmic codes for values ``x`` [N] that count ``weight`` [N].

    Every pair of τ and largest value is tried with zero points that reach at least half way to the
    least value. ``highest``: what the largest value must be, where it is known.
    """
    order = np.argsort(x, kind="stable")
    x, weight = x[order].astype(np.float64), weight[order]
    sums = [np.concatenate([[0.0], np.cumsum(weight * x**p)]) for p in range(3)]
    ends = [highest] if highest else [max(float(x[-1]) * part, TINY) for part in LARGEST]
    least, best = np.inf, (ends[0], (1 << bits) - 1, rates(bits)[0])
    for scale, zero, eighths in _candidates(float(-x[0]), ends, bits):
        top = (1 << bits) - 1
        values = level(np.arange(top + 1), top, eighths) - level(np.array(zero), top, eighths)
        values = np.sort(values * scale)
        cuts = np.searchsorted(x, (values[1:] + values[:-1]) / 2)
        edges = np.concatenate([[0], cuts, [len(x)]])
        none, first, second = (np.diff(s[edges]) for s in sums)
        error = float(np.sum(second - 2 * values * first + values**2 * none))
        if error < least:
            least, best = error, (scale, zero, eighths)
    scale, zero, eighths = best
    numbers = np.array([scale], np.float32), np.array([zero], np.int32)
    return Solved(*numbers, {"eighths": eighths})


def few_rows(rows: Array) -> Array:
    """About ``SEARCHED_ROWS`` of the rows [R, C], evenly."""
    return rows[:: max(1, len(rows) // SEARCHED_ROWS)]


def logarithmic_range_of_rows(
    rows: Array, power: Double, bits: int, highest: float | None = None
) -> Solved:
    """As :func:`logarithmic_range`, for :func:`few_rows` of rows [R, C] whose channels count
    ``power`` [C]."""
    rows = few_rows(rows)
    weight = np.broadcast_to(power, rows.shape)
    return logarithmic_range(rows.ravel(), weight.ravel(), bits, highest)


def rates(bits: int) -> list[int]:
    """τ in eighths, each once."""
    grown = [round(PARTS * rate * 2.0 ** (bits - 4)) for rate in RATES]
    return sorted({int(np.clip(eighths, LEAST, MOST)) for eighths in grown})


def _candidates(depth: float, ends: Iterable[float], bits: int) -> Iterator[tuple[float, int, int]]:
    """M, zero point and τ (in eighths) of codes that end there; ``depth``: how far the values go
    below zero."""
    top = (1 << bits) - 1
    for eighths in rates(bits):
        units = level(np.arange(top + 1), top, eighths)
        for high in ends:
            with np.errstate(divide="ignore", invalid="ignore"):
                below = units * high / (1 - units)  # where each zero point would put the least
            near = (below >= 0.5 * depth) & (units > 0) & (units < 1)
            zeros = np.flatnonzero(near) if depth > 1e-3 * high else np.array([top])
            for zero in zeros[:: max(1, len(zeros) // 16)]:
                yield high / (1 - float(units[zero])), int(zero), eighths


def share_rate(attention: Array, values: Array, bits: int) -> int:
    """τ, in eighths, of logarithmic codes relative to the largest of a row [U, R, T] whose decoded
    rows are divided by their sums: by the least squared error of the product with V [U, T, N]."""
    top = (1 << bits) - 1
    exact = attention @ values
    relative = attention / np.maximum(attention.max(axis=-1, keepdims=True), TINY)
    errors = {}
    for eighths in rates(bits):
        levels = np.sort(level(np.arange(top + 1), top, eighths)).astype(np.float32)
        made = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, relative)]
        found = made @ values / made.sum(axis=-1, keepdims=True)
        errors[eighths] = float(np.sum((found - exact) ** 2, dtype=np.float64))
    return min(errors, key=lambda eighths: errors[eighths])
