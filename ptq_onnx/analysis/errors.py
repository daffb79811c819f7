"""Running sums of the error between a float tensor and its quantized counterpart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.analysis.results import Error, decibels

Array = NDArray[np.float32]

WORST = 1e20
"""The noise-to-signal ratio that stands for noise without any signal (-200 dB)."""


@dataclass
class Sums:
    """Running sums of one tensor pair; float64."""

    signal: float = 0.0
    noise: float = 0.0
    power: float = 0.0
    dot: float = 0.0
    count: int = 0
    largest: float = 0.0

    def add(self, reference: Array, value: Array) -> None:
        """Fold in one batch of float and quantized values (same shape)."""
        f = reference.ravel().astype(np.float64)
        q = value.ravel().astype(np.float64)
        error = q - f
        self.signal += float(f @ f)
        self.noise += float(error @ error)
        self.power += float(q @ q)
        self.dot += float(f @ q)
        self.count += f.size
        self.largest = max(self.largest, float(np.abs(error).max(initial=0)))

    @property
    def snr(self) -> float:
        """Σ(q - f)² / Σf², at most ``WORST``; 0 where both sums are zero."""
        if self.noise == 0:
            return 0.0
        return min(self.noise / max(self.signal, 1e-30), WORST)

    @property
    def cosine(self) -> float:
        """Cosine of float and quantized values; 1 where both are zero."""
        scale = math.sqrt(self.signal * self.power)
        return 1.0 if scale == 0 else self.dot / scale


def logits_error(reference: Array, value: Array) -> Error:
    """The error of logits [N, classes] (or of any output), with the share of equal top classes."""
    sums = Sums()
    sums.add(reference, value)
    rows = len(reference)
    same = reference.reshape(rows, -1).argmax(axis=1) == value.reshape(rows, -1).argmax(axis=1)
    return Error(
        snr=sums.snr,
        snr_db=decibels(sums.snr),
        mse=sums.noise / max(sums.count, 1),
        cosine=sums.cosine,
        max_abs=sums.largest,
        agreement=100 * float(same.mean()) if rows else 100.0,
    )
