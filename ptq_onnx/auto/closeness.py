"""How close a quantized model is to the float one, from the logits of both."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.analysis.errors import logits_error
from ptq_onnx.analysis.results import Closeness
from ptq_onnx.preprocess import FloatArray

Labels = NDArray[np.int64]


def closeness(reference: FloatArray, logits: FloatArray, truth: Labels | None) -> Closeness:
    """Drop of top-1, SQNR and agreement of logits [N, classes] against the float model's."""
    error = logits_error(reference, logits)
    drop = None
    if truth is not None:
        # Counted, not subtracted: the difference of two rounded shares may miss a bound it is on.
        lost = int(hits(reference, truth).sum()) - int(hits(logits, truth).sum())
        drop = 100 * lost / len(truth)
    return Closeness(drop, error.snr_db, error.agreement)


def hits(logits: FloatArray, truth: Labels) -> NDArray[np.bool_]:
    """Whether the top class is the right one; of equals the first leads."""
    return np.asarray(logits.argmax(axis=1) == truth)


def drop_error(reference: FloatArray, logits: FloatArray, truth: Labels) -> float:
    """One standard error of the drop in points: √(b + c - (b - c)² / N) / N · 100.

    b and c count the images that only one of the two models gets right (McNemar's table). With
    none, one is assumed: so few images cannot rule it out.
    """
    before, after = hits(reference, truth), hits(logits, truth)
    b, c = int((before & ~after).sum()), int((after & ~before).sum())
    count = len(truth)
    if b + c == 0:
        return 100 / count
    return 100 * math.sqrt(max(b + c - (b - c) ** 2 / count, 0)) / count
