"""Reads one QuantizeLinear or DequantizeLinear: codes, scale, zero point, axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import name_of
from ptq_onnx.graph.codings import DYNAMIC, QUANTIZE

INT8, UINT8, INT32 = ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32
FP8 = ir.DataType.FLOAT8E4M3FN
FOUR_BITS = (ir.DataType.INT4, ir.DataType.UINT4)
EIGHT_BITS = (INT8, UINT8, FP8)
SIXTEEN_BITS = (ir.DataType.INT16, ir.DataType.UINT16)


@dataclass(frozen=True, eq=False)
class Coding:
    """What one QuantizeLinear or DequantizeLinear node says."""

    node: ir.Node

    @property
    def name(self) -> str:
        """Name of the node."""
        return name_of(self.node)

    @property
    def quantizes(self) -> bool:
        """True for QuantizeLinear."""
        return self.node.op_type == QUANTIZE

    @property
    def dynamic(self) -> bool:
        """True for a DequantizeLinear of what DynamicQuantizeLinear made."""
        data = self.node.inputs[0]
        maker = None if data is None else back_through_moves(data)[0].producer()
        return maker is not None and maker.op_type == DYNAMIC

    @cached_property
    def scale(self) -> NDArray[np.float64] | None:
        """None where it is computed at run time."""
        found = constant(self.node.inputs[1])
        return None if found is None else found.astype(np.float64)

    @cached_property
    def zero_point(self) -> NDArray[np.float64] | None:
        """Zero where the node has none; None where it is computed at run time."""
        value = self._zero_point_value
        if value is None:
            return np.zeros(())
        found = constant(value)
        return None if found is None else found.astype(np.float64)

    @property
    def zero_point_type(self) -> ir.DataType | None:
        """The type of the zero point; None without one."""
        value = self._zero_point_value
        return None if value is None else type_of(value)

    @property
    def dtype(self) -> ir.DataType | None:
        """The type of the codes; None where nothing says."""
        if not self.quantizes:
            data = self.node.inputs[0]
            return (None if data is None else type_of(data)) or self.zero_point_type
        stated = self.node.attributes.get_int("output_dtype", 0)
        if self._zero_point_value is not None:
            return self.zero_point_type
        return ir.DataType(stated) if stated else UINT8

    @property
    def axis(self) -> int:
        """As written: it may be negative."""
        return self.node.attributes.get_int("axis", 1)

    @property
    def block_size(self) -> int:
        """0 where the scales are not block-wise."""
        return self.node.attributes.get_int("block_size", 0)

    @property
    def per_tensor(self) -> bool:
        """One scale for all elements; True as well where the scale is not known."""
        if self.scale is None:
            shape = None if self.node.inputs[1] is None else self.node.inputs[1].shape
            return shape is None or len(shape) == 0
        return self.scale.size == 1

    @property
    def _zero_point_value(self) -> ir.Value | None:
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of an initializer or a Constant node, also behind Identity, or widened from 4 to 8
    bits, in blocks too (``qdq/four_bits.py``); else None."""
    widened = False
    while value is not None:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            narrow = tensor.dtype in FOUR_BITS
            return None if widened and not narrow else tensor.numpy()
        node = value.producer()
        if node is None or node.op_type not in ("Identity", "Cast"):
            return None
        widened = widened or node.op_type == "Cast"
        value = node.inputs[0]
        maker = None if value is None else value.producer()
        if widened and maker is not None and maker.op_type == "Gather":
            found = _computed(value)
            return None if found is None else found.astype(np.int8)
    return None


_COMPUTED: Mapping[str, Callable[[Any, Any], Any]] = {
    "Reshape": np.reshape,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Gather": lambda data, index: data[index],
}
"""What codes in blocks of rows are made by, of whole numbers."""


def _computed(value: ir.Value | None) -> NDArray[Any] | None:
    """Whole numbers that those ops make of constants; else None."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.numpy()
    node = None if value is None else value.producer()
    if node is None or node.op_type not in ("Cast", *_COMPUTED):
        return None
    found = [_computed(v) for v in node.inputs]
    if any(one is None for one in found):
        return None
    if node.op_type == "Cast":
        return np.asarray(found[0]).astype(np.int64)
    made: NDArray[Any] = _COMPUTED[node.op_type](*found)
    return made


def type_of(value: ir.Value) -> ir.DataType | None:
    """The element type, from the value itself or from the QuantizeLinear that makes it."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.dtype
    if value.dtype is not None:
        return value.dtype
    node = value.producer()
    if node is None:
        return None
    if node.op_type == QUANTIZE:
        return Coding(node).dtype
    data = node.inputs[0] if node.inputs and is_move(node) else None
    return None if data is None else type_of(data)


MOVES = frozenset(
    (
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    )
)
"""Ops that move elements of their first input and keep their values."""


def is_move(node: ir.Node) -> bool:
    """True for those ops; a Gather by computed indices looks values up in a table."""
    if node.op_type == "Gather" and constant(node.inputs[1]) is None:
        return False
    return node.op_type in MOVES and node.domain == ""


def back_through_moves(value: ir.Value) -> tuple[ir.Value, tuple[ir.Node, ...]]:
    """The value before the ops that only moved it, and those ops, nearest first."""
    moves: list[ir.Node] = []
    node = value.producer()
    while node is not None and is_move(node):
        data = node.inputs[0]
        if data is None:
            break
        moves.append(node)
        value, node = data, data.producer()
    return value, tuple(moves)
