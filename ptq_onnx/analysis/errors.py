"""Running sums of the error between a float tensor and its quantized counterpart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.analysis.decibels import decibels
from ptq_onnx.analysis.results import Error
from ptq_onnx.evaluation.outputs import classes_of, top_classes
from ptq_onnx.numerics.dot import dot

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
        self.signal += dot(f, f)
        self.noise += dot(error, error)
        self.power += dot(q, q)
        self.dot += dot(f, q)
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
    """The error of logits [N, classes], with the share of equal top classes, or of any output."""
    same = top_classes(reference) == top_classes(value) if classes_of(reference) else None
    return output_error(reference, value, same)


def outputs_error(references: Sequence[Array], values: Sequence[Array]) -> Error:
    """The error of all outputs at once: each divided by its root mean square in the float model,
    so that all count alike. The top classes are those of the first [batch, classes]."""
    if len(references) == 1:
        return logits_error(references[0], values[0])
    same = next(
        (
            top_classes(f) == top_classes(q)
            for f, q in zip(references, values, strict=True)
            if classes_of(f)
        ),
        None,
    )
    scales = [math.sqrt(float(np.mean(np.square(f, dtype=np.float64)))) or 1.0 for f in references]
    weights = [s * math.sqrt(f.size) for s, f in zip(scales, references, strict=True)]
    flat = [
        np.concatenate([v.ravel() / w for v, w in zip(part, weights, strict=True)])
        for part in (references, values)
    ]
    return output_error(flat[0], flat[1], same)


def output_error(reference: Array, value: Array, same: NDArray[np.bool_] | None) -> Error:
    """The error of any values; ``same``: which images have the same top class."""
    sums = Sums()
    sums.add(reference, value)
    return Error(
        snr=sums.snr,
        snr_db=decibels(sums.snr),
        mse=sums.noise / max(sums.count, 1),
        cosine=sums.cosine,
        max_abs=sums.largest,
        agreement=None if same is None else 100 * float(same.mean()) if len(same) else 100.0,
    )
