"""What a file reads back for a tensor: quantized and dequantized values of every kind of spec.

One function for all who ask. Rows and centred values are quantized relative to what the file
finds at run time (a row's largest value, the mean over tokens) and given back after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.calibration.mean_centred import TOKENS
from ptq_onnx.numerics.log2 import log2_codes, log2_values
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.numerics.uniform import Array, dequantize, over, quantize

E4M3_EDGE = 464
"""Half a step beyond 448, the largest value of FP8 E4M3."""


@dataclass(frozen=True)
class Relative:
    """A tensor as ``part`` · ``factor`` + ``shift``; only ``part`` is held in codes."""

    part: Array
    factor: Any = 1
    shift: Any = 0


def relative(x: Array, spec: TensorSpec) -> Relative:
    """What of ``x`` the codes of ``spec`` stand for."""
    if spec.rule.granularity == "row":
        top = x.max(axis=-1, keepdims=True)
        top = np.where(top > 0, top, np.float32(1))
        return Relative(np.asarray(x / top, np.float32), factor=top)
    if spec.rule.centred:
        # The mean of values rounded to the step, as in the file (lowering.py).
        step = np.asarray(spec.scale, np.float32)
        whole = np.rint(x * (np.float32(1) / step)).sum(axis=TOKENS, keepdims=True)
        mean = np.asarray(whole * (step / np.float32(x.shape[TOKENS])), np.float32)
        return Relative(np.asarray(x - mean, np.float32), shift=mean)
    return Relative(x)


def fake_quantize(x: Array, spec: TensorSpec) -> Array:
    """Quantized and dequantized values, float32, of a tensor of any shape that fits the spec."""
    if spec.rule.code == "log2":
        return values_of(log2_codes(x, spec.rule.bits), spec)
    found = relative(x, spec)
    values = values_of(quantize(found.part, spec), spec)
    return np.asarray(values * found.factor + found.shift, np.float32)


def values_of(codes: NDArray[np.int32], spec: TensorSpec) -> Array:
    """What codes stand for, float32."""
    if spec.rule.code == "log2":
        return log2_values(codes, spec.rule.bits)
    return dequantize(codes, spec)


def reach(spec: TensorSpec) -> tuple[float, float]:
    """The values of the smallest and the largest code, in the channel where they are widest."""
    if spec.rule.code == "log2":
        return 0.0, 1.0
    step = np.asarray(spec.scale, np.float64)
    if spec.factor is not None:
        # A factor has axes of its own where the scale has one: their product's extremes.
        step = step.ravel()[:, None] * spec.factor.astype(np.float64).ravel()
    zero = 0 if spec.rule.code == "e4m3" else spec.zero_point
    zero = np.reshape(zero, (-1, 1)) if spec.factor is not None else zero
    low, high = ((edge - zero) * step for edge in spec.rule.limits)
    return float(np.min(low)), float(np.max(high))


def clipped(x: Array, spec: TensorSpec) -> NDArray[np.bool_]:
    """Which values lie more than half a step beyond the smallest and the largest code."""
    if spec.rule.code == "log2":
        return np.zeros(x.shape, np.bool_)
    part = relative(x, spec).part
    step = over(spec.scale, spec, x.shape) * (1 if spec.factor is None else spec.factor)
    if spec.rule.code == "e4m3":
        return np.asarray(np.abs(part) > E4M3_EDGE * step)
    zero = over(spec.zero_point, spec, x.shape).astype(np.float32)
    low, high = (edge - zero for edge in spec.rule.limits)
    return np.asarray((part < (low - 0.5) * step) | (part > (high + 0.5) * step))
