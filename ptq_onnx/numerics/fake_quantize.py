"""What a file reads back for a tensor: quantized and dequantized values of every kind of spec.

One place for all who ask. What is done around a code (``around/``) is done here too: rows and
centred values are quantized relative to what the file finds at run time, and given back after it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.numerics.around.around import Relative
from ptq_onnx.numerics.codes.code import Array, Codes
from ptq_onnx.numerics.spec import TensorSpec


def quantize(x: Array, spec: TensorSpec) -> Codes:
    """Codes (int32, shape of ``x``) of what the spec's codes stand for. NaN is not allowed."""
    scaled = x if spec.factor is None else x / spec.factor
    return spec.rule.code.codes(scaled, spec.numbers(x.shape))


def dequantize(codes: Codes, spec: TensorSpec) -> Array:
    """Float32 values of codes, times the factor."""
    values = spec.rule.code.values(codes, spec.numbers(codes.shape))
    return np.asarray(values if spec.factor is None else values * spec.factor, np.float32)


def relative(x: Array, spec: TensorSpec) -> Relative:
    """What of ``x`` the codes of ``spec`` stand for."""
    found = Relative(x)
    for around in spec.rule.around:
        inner = around.relative(found.part, spec.scale)
        factor, shift = found.factor * inner.factor, found.shift + found.factor * inner.shift
        found = Relative(inner.part, factor, shift)
    return found


def fake_quantize(x: Array, spec: TensorSpec) -> Array:
    """Quantized and dequantized values, float32, of a tensor of any shape that fits the spec."""
    found = relative(x, spec)
    values = dequantize(quantize(found.part, spec), spec)
    return np.asarray(values * found.factor + found.shift, np.float32)


def reach(spec: TensorSpec) -> tuple[float, float]:
    """The values of the smallest and the largest code, in the channel where they are widest."""
    numbers = replace(spec.numbers(None), scale=np.asarray(spec.scale, np.float64))
    if spec.factor is not None:
        # A factor has axes of its own where the scale has one: their product's extremes.
        step = numbers.scale.ravel()[:, None] * spec.factor.astype(np.float64).ravel()
        zero = np.reshape(spec.zero_point, (-1, 1))
        numbers = replace(numbers, scale=step, zero_point=zero)
    low, high = spec.rule.code.reach(numbers)
    return float(np.min(low)), float(np.max(high))


def clipped(x: Array, spec: TensorSpec) -> NDArray[np.bool_]:
    """Which values lie more than half a step beyond the smallest and the largest code."""
    numbers = spec.numbers(x.shape)
    step = numbers.scale * (1 if spec.factor is None else spec.factor)
    return spec.rule.code.clipped(relative(x, spec).part, replace(numbers, scale=step))
