"""A·V divided by the row sums of A's values, which do not sum to one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ptq_onnx.numerics.around.around import Around, ones_for_zeros
from ptq_onnx.numerics.builder import Builder, V
from ptq_onnx.numerics.codes.code import Array


@dataclass(frozen=True)
class RowSums(Around):
    """A V / (sum of A over its last axis)."""

    name: ClassVar[str] = "renormalize"

    def behind(self, product: Array, values: Array) -> Array:
        """A product [..., N, D] over the sums of the rows of what was multiplied."""
        total = ones_for_zeros(values.sum(axis=-1, keepdims=True))
        return np.asarray(product / total, np.float32)

    def emit_behind(self, builder: Builder[V], product: V, values: V) -> V:
        """ReduceSum over the last axis, and the Div behind the product."""
        axes = builder.constant("last_axis", np.array([-1], np.int64))
        total = builder.op("ReduceSum", [values, axes], "row_sum", shaped=False)
        return builder.op("Div", [product, total], "renormalized")
