"""What may be done around a code: its meaning on arrays, and the ONNX nodes that do the same."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.numerics.builder import Builder, V
from ptq_onnx.numerics.codes.code import Array, Numbers

ClipOf = Literal["values", "centred", "row"]


@dataclass(frozen=True, eq=False)
class Relative:
    """A tensor as ``part`` · ``factor`` + ``shift``; only ``part`` is held in codes."""

    part: Array
    factor: Any = 1
    shift: Any = 0


@dataclass(frozen=True, eq=False)
class Restore(Generic[V]):
    """What gives back what was taken from a tensor: a node on the values, or on the output of a
    product that reads them as its input ``index``."""

    op_type: str
    other: V
    suffix: str
    index: int


@dataclass(frozen=True)
class Around(ABC):
    """One of those in this folder."""

    name: ClassVar[str]
    per_row: ClassVar[bool] = True
    """A row (the last axis) is enough to do it."""
    clip_of: ClassVar[ClipOf] = "values"
    """What the range of the codes is of."""
    cancels_row_factors: ClassVar[bool] = False
    """A product of rows times factors of their own is the same as without."""

    def relative(self, x: Array, scale: Array) -> Relative:
        """What of ``x`` the codes of that scale stand for."""
        return Relative(x)

    def before(
        self, builder: Builder[V], value: V, numbers: Numbers
    ) -> tuple[V, Restore[V]] | None:
        """Nodes that make the part that is held in codes; None where it is the tensor itself."""
        return None

    def emit_codes(self, builder: Builder[V], value: V) -> V | None:
        """Nodes that compute codes and values at once, in place of the code's own; None where there
        are none."""
        return None

    def behind(self, product: Array, values: Array) -> Array:
        """A product [..., N, M] of decoded ``values`` [..., N, K], which its codes do not give
        by themselves."""
        return product

    def emit_behind(self, builder: Builder[V], product: V, values: V) -> V | None:
        """Nodes that do so; None where nothing is done."""
        return None


def ones_for_zeros(total: NDArray[Any]) -> NDArray[Any]:
    """What may be divided by."""
    return np.where(total == 0, total.dtype.type(1), total)
