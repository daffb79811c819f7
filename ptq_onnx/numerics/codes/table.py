"""Codes whose values come from a table: what DequantizeLinear is to uniform codes."""

from __future__ import annotations

import numpy as np

from ptq_onnx.numerics.builder import Builder, V
from ptq_onnx.numerics.codes.code import Array


def look_up(builder: Builder[V], level: V, table: Array) -> V:
    """The values [N] of whole numbers 0 … N - 1, which are held as uint8."""
    codes = builder.cast(level, "quantized", np.dtype(np.uint8))
    index = builder.cast(codes, "index", np.dtype(np.int32))
    levels = builder.constant("levels", table)
    return builder.op("Gather", [levels, index], "dequantized")
