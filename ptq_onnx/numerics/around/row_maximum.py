"""Every row divided by its largest value, which is found at run time: its codes use all levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ptq_onnx.numerics.around.around import Around, ClipOf, Relative, Restore
from ptq_onnx.numerics.builder import Builder, V
from ptq_onnx.numerics.codes.code import Array, Numbers


@dataclass(frozen=True)
class RowMaximum(Around):
    """x = (x / m) · m, m the maximum over the last axis; of tensors that are not negative."""

    name: ClassVar[str] = "row"
    clip_of: ClassVar[ClipOf] = "row"

    def relative(self, x: Array, scale: Array) -> Relative:
        """Rows [..., N] over their largest value, over 1 where that is not positive."""
        top = x.max(axis=-1, keepdims=True)
        top = np.where(top > 0, top, np.float32(1))
        return Relative(np.asarray(x / top, np.float32), factor=top)

    def before(self, builder: Builder[V], value: V, numbers: Numbers) -> tuple[V, Restore[V]]:
        """Divide by the row's maximum, and give the Mul that restores it behind the product."""
        axes = builder.constant("row", np.array([-1], np.int64))
        top = builder.op("ReduceMax", [value, axes], "row_max", single=-1)
        part = builder.op("Div", [value, top], "row_scaled")
        return part, Restore("Mul", top, "row_rescaled", 0)
