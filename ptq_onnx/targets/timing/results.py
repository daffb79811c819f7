"""What a benchmark finds, and the arithmetic from seconds to figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Rounds = Sequence[Sequence[float]]
"""Seconds of every run, by round."""


@dataclass(frozen=True)
class Timing:
    """One model at one batch size and precision.

    ``median_ms``, ``q1_ms``, ``q3_ms``: quartiles over all runs. ``speedup``: over the first
    model as written at the same batch, the median of the ratio within each round. ``same_as``:
    the model before it that is the same file, so that its speed-up is noise.
    """

    model: str
    path: str
    quantized: bool
    bytes: int
    batch: int
    precision: str
    runs: int
    median_ms: float
    q1_ms: float
    q3_ms: float
    images_per_second: float
    speedup: float
    peak_memory_bytes: int | None = None
    same_as: str | None = None

    @property
    def iqr_ms(self) -> float:
        """The spread: between a quarter and three quarters of the runs."""
        return self.q3_ms - self.q1_ms


@dataclass(frozen=True)
class Benchmark:
    """All timings, in the order of batch, model, precision; ``notes`` says what to know."""

    runtime: str
    version: str
    device: str
    threads: int
    seconds: float
    timings: tuple[Timing, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; ``iqr_ms`` is spelled out."""
        plain = asdict(self)
        plain["timings"] = [{**asdict(t), "iqr_ms": t.iqr_ms} for t in self.timings]
        plain["notes"] = list(self.notes)
        return plain


def quartiles_ms(rounds: Rounds) -> tuple[float, float, float]:
    """First quartile, median and third quartile of all runs, in milliseconds."""
    runs = np.concatenate([np.asarray(r, dtype=np.float64) for r in rounds])
    q1, median, q3 = np.percentile(runs, (25, 50, 75)) * 1e3
    return float(q1), float(median), float(q3)


def speedup(rounds: Rounds, reference: Rounds) -> float:
    """How many times faster than the reference, from the ratios of the rounds' medians.

    Within a round both met the same machine: one that slows down half-way changes no ratio.
    """
    ratios = [np.median(r) / np.median(own) for own, r in zip(rounds, reference, strict=True)]
    return float(np.median(ratios))
