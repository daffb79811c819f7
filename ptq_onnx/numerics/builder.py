"""What a code or what is around it needs to write itself as ONNX nodes.

Nothing in ``numerics`` knows a graph: whoever owns one (``qdq/nodes.py``) gives a builder, and
``V`` is what it calls a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

V = TypeVar("V")


class Builder(Protocol[V]):
    """Puts nodes one behind the other, named after one tensor and of its shape."""

    def constant(self, suffix: str, array: NDArray[Any] | np.generic) -> V:
        """An initializer."""
        ...

    def op(
        self,
        op_type: str,
        inputs: Sequence[V],
        suffix: str,
        *,
        dtype: np.dtype[Any] | None = None,
        single: int | None = None,
        shaped: bool = True,
    ) -> V:
        """The output of a new node: of ``dtype``, or the tensor's own; of its shape, but with
        size 1 along the axis ``single``, or of none that is stated."""
        ...

    def quantize_dynamically(self, value: V) -> tuple[V, V, V]:
        """The codes (uint8), the scale and the zero point of a new DynamicQuantizeLinear."""
        ...

    def cast(self, value: V, suffix: str, dtype: np.dtype[Any]) -> V:
        """The output of a new Cast."""
        ...

    def size(self, axis: int) -> int:
        """Of the tensor, along an axis; 0 where that is known at run time only."""
        ...
