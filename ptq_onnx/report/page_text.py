"""Numbers as the page shows them, and as its columns sort by them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ptq_onnx.evaluation.metrics.metric import AS_FLOAT
from ptq_onnx.evaluation.outputs import MOST_DB

EXACT = "exact"
"""What stands for infinite dB."""


def number(value: Any) -> str:
    """Four significant digits; whole numbers as they are; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and value < 1e6):
        return str(int(value))
    return f"{value:.4g}" if math.isfinite(value) else "∞" if value == math.inf else str(value)


def decibel_text(value: float | None, ratio: float | None, digits: int = 1, unit: str = "") -> str:
    """dB as text: ``exact`` without any error, which JSON holds as null beside a ratio of 0."""
    if value is None:
        return EXACT if ratio == 0 else ""
    return f"{value:.{digits}f}{unit}" if value < MOST_DB else EXACT


def metric_text(value: float | None, unit: str, digits: int = 2) -> str:
    """A metric in its unit: percent with so many digits, a plain number with two more."""
    if value is None:
        return "–"
    return f"{value:.{digits}f} %" if unit == "%" else f"{value:.{digits + 2}f}"


def truth_text(targets: str) -> str:
    """Where a metric's truth is from, in words."""
    return "the float model's answers are the truth" if targets == AS_FLOAT else f"truth: {targets}"


def cell(value: Any) -> str:
    """What a column sorts by: the number in full, or nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return "1e999" if value == math.inf else repr(float(value))


def counts(found: Mapping[str, int]) -> str:
    """``MatMul 49, Add 12``; what occurs never is left out."""
    return ", ".join(f"{name} {count}" for name, count in found.items() if count)


def size(count: int) -> str:
    """Bytes in kB or MB (powers of ten)."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
