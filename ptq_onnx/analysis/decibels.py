"""Ratios of noise to signal in dB, and numbers as JSON holds them."""

from __future__ import annotations

import math
from typing import Annotated, Any

Decibels = Annotated[
    float, "dB, higher is better; null where there is no error at all: the ratio beside it is 0"
]
"""-10 log10 of a noise-to-signal ratio; infinite without noise, which JSON holds as null."""


def decibels(snr: float) -> float:
    """-10 log10 of a noise-to-signal ratio; infinite where there is no noise at all."""
    return math.inf if snr <= 0 else -10 * math.log10(snr)


def difference(one: float, other: float) -> float:
    """``one`` less ``other``, in dB; 0 where both are without error."""
    return 0.0 if one == other else one - other


def plain(value: Any) -> Any:
    """The value as JSON holds it: lists for tuples, null for infinite numbers and NaN."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
