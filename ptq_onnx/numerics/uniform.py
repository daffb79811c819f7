"""Uniform quantization as pure functions on arrays.

Symmetric:  x_q = clip(round(x / s), -2^(b-1), 2^(b-1) - 1)
Asymmetric: x_q = clip(round(x / s) + z, 0, 2^b - 1)

Rounding is half to even, as ONNX's QuantizeLinear. Source: FQ-ViT, arXiv 2111.13824,
section 3.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.numerics.e4m3 import e4m3_codes, e4m3_values
from ptq_onnx.numerics.spec import TensorSpec

Array = NDArray[np.float32]

TINY = float(np.finfo(np.float32).tiny) * 2**32
"""The smallest scale: division by it stays finite for every activation below 2^30."""


def along(vector: NDArray[Any], axis: int | None, ndim: int) -> NDArray[Any]:
    """Reshape a vector so that it broadcasts along ``axis`` of an ``ndim``-d tensor."""
    if axis is None or vector.ndim == 0:
        return vector
    shape = [1] * ndim
    shape[axis] = -1
    return vector.reshape(shape)


def over(vector: NDArray[Any], spec: TensorSpec, shape: tuple[int, ...]) -> NDArray[Any]:
    """The spec's scale or zero point in a form that broadcasts against a tensor of ``shape``."""
    if not spec.rule.block_size:
        return along(vector, spec.axis, len(shape))
    return np.repeat(vector, spec.rule.block_size, axis=0)[: shape[0]]


def quantize(x: Array, spec: TensorSpec) -> NDArray[np.int32]:
    """Integer codes (int32, shape of ``x``) of a float tensor. NaN is not allowed."""
    low, high = spec.rule.limits
    scaled = x if spec.factor is None else x / spec.factor
    step = over(spec.scale, spec, x.shape)
    if spec.rule.code == "e4m3":
        return e4m3_codes(scaled / step)
    zero = over(spec.zero_point, spec, x.shape)
    codes = np.rint(scaled / step) + zero
    return np.asarray(np.clip(codes, low, high), np.int32)


def dequantize(codes: NDArray[np.int32], spec: TensorSpec) -> Array:
    """Float32 values of integer codes: (code - zero_point) * scale * factor."""
    step = over(spec.scale, spec, codes.shape)
    zero = over(spec.zero_point, spec, codes.shape)
    unit = e4m3_values(codes) if spec.rule.code == "e4m3" else (codes - zero).astype(np.float32)
    value = unit * step.astype(np.float32)
    return np.asarray(value if spec.factor is None else value * spec.factor, np.float32)


def symmetric_scale(low: Array, high: Array, limits: tuple[int, int]) -> Array:
    """Scale that covers [low, high] with zero point 0 (any shape; the same shape back).

    The larger side decides: s = max(|low| / |q_min|, high / q_max), at least ``TINY``.
    """
    smallest, largest = limits
    scale = np.maximum(np.maximum(-low, 0) / max(-smallest, 1), np.maximum(high, 0) / largest)
    if smallest == 0:
        scale = np.maximum(high, 0) / largest
    return np.maximum(scale, TINY).astype(np.float32)


def asymmetric_scale(
    low: Array, high: Array, limits: tuple[int, int]
) -> tuple[Array, NDArray[np.int32]]:
    """Scale and zero point that cover [low, high], zero being exact (any shape).

    s = (high - low) / (q_max - q_min), z = round(q_min - low / s), with the range widened
    to hold zero.
    """
    smallest, largest = limits
    # In float64: the width of a range may be beyond float32.
    low, high = np.minimum(low, np.float64(0)), np.maximum(high, np.float64(0))
    scale = np.maximum((high - low) / (largest - smallest), TINY).astype(np.float32)
    zero = np.clip(np.rint(smallest - low / scale), smallest, largest).astype(np.int32)
    return scale, zero
