"""Attention values V without their mean over the tokens of the image.

The mean is one of whole steps of the scale: a sum of whole numbers does not depend on its order,
which ONNX Runtime's optimizer changes with the layout, and a last bit moves codes. So does the
division of its ReduceMean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ptq_onnx.numerics.around.around import Around, ClipOf, Relative, Restore
from ptq_onnx.numerics.builder import Builder, V
from ptq_onnx.numerics.codes.code import Array, Numbers

TOKENS = -2
"""The axis of the tokens in V."""


@dataclass(frozen=True)
class TokenMean(Around):
    """x = (x - v) + v, v the mean over the tokens of x rounded to whole steps."""

    name: ClassVar[str] = "centred"
    per_row: ClassVar[bool] = False
    clip_of: ClassVar[ClipOf] = "centred"

    def relative(self, x: Array, scale: Array) -> Relative:
        """Values [..., T, C] without their mean over the T tokens, each rounded to steps of
        ``scale`` before the mean is taken: then no order of summing changes it."""
        step = np.asarray(scale, np.float32)
        whole = np.rint(x * (np.float32(1) / step)).sum(axis=TOKENS, keepdims=True)
        mean = np.asarray(whole * (step / np.float32(x.shape[TOKENS])), np.float32)
        return Relative(np.asarray(x - mean, np.float32), shift=mean)

    def before(self, builder: Builder[V], value: V, numbers: Numbers) -> tuple[V, Restore[V]]:
        """Subtract the mean over the tokens, and give the Add that restores it behind the
        product."""
        step, tokens = np.float32(numbers.scale), builder.size(TOKENS)
        inverse = builder.constant("mean_inverse_step", np.float32(1) / step)
        axes = builder.constant("tokens", np.array([TOKENS], np.int64))
        whole = builder.op("Mul", [value, inverse], "mean_scaled")
        whole = builder.op("Round", [whole], "mean_rounded")
        total = builder.op("ReduceSum", [whole, axes], "sum", single=TOKENS)
        by = builder.constant("mean_step", step / np.float32(tokens))
        mean = builder.op("Mul", [total, by], "mean", single=TOKENS)
        part = builder.op("Sub", [value, mean], "centred")
        return part, Restore("Add", mean, "mean_restored", 1)
