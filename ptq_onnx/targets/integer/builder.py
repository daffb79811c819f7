"""Builds the graph of integers, node by node; shares equal constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

RANGE_KEY = "ptq_onnx.range"
"""Metadata of a node whose output's range follows from a proof, not from intervals alone."""

TYPES: dict[ir.DataType, type[np.integer[Any]]] = {
    ir.DataType.UINT8: np.uint8,
    ir.DataType.INT8: np.int8,
    ir.DataType.UINT16: np.uint16,
    ir.DataType.UINT32: np.uint32,
    ir.DataType.INT32: np.int32,
    ir.DataType.UINT64: np.uint64,
    ir.DataType.INT64: np.int64,
}
U8, U32, U64 = ir.DataType.UINT8, ir.DataType.UINT32, ir.DataType.UINT64
U16 = ir.DataType.UINT16
I8, I32, I64 = ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64
BOOL, FLOAT = ir.DataType.BOOL, ir.DataType.FLOAT


def type_of_codes(high: int) -> ir.DataType:
    """The narrowest type of codes 0 … ``high``."""
    return U8 if high < 1 << 8 else U16


class Builder:
    """The nodes and constants of one graph. ``prefix`` goes before the names of new nodes."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self.prefix = ""
        self._names: set[str] = set()
        self._shared: dict[tuple[Any, ...], ir.Value] = {}
        self._wide: dict[tuple[Any, ...], ir.Value] = {}

    def unique(self, name: str) -> str:
        """The name, or the name with a number behind it where it is taken."""
        candidate, n = name, 1
        while candidate in self._names:
            candidate, n = f"{name}_{n}", n + 1
        self._names.add(candidate)
        return candidate

    def constant(self, array: NDArray[Any], name: str = "c") -> ir.Value:
        """An initializer; one for all equal arrays."""
        array = np.array(array, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._shared:
            label = self.unique(name)
            tensor = ir.Tensor(array, name=label)
            value = ir.Value(
                name=label, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)
            )
            self.constants.append(value)
            self._shared[key] = value
        return self._shared[key]

    def number(self, value: Any, dtype: ir.DataType = I64) -> ir.Value:
        """Integers as an initializer of that type."""
        return self.constant(np.asarray(value).astype(TYPES[dtype]))

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType,
        attributes: Mapping[str, Any] | None = None,
        *,
        name: str = "",
        bounds: tuple[int, int] | None = None,
    ) -> ir.Value:
        """A node's output. ``bounds``: its proved range, for the analysis of widths."""
        label = self.unique(name or f"{self.prefix}/{op_type}")
        node = ir.node(op_type, list(inputs), attributes or {}, name=label, num_outputs=1)
        output = node.outputs[0]
        output.name, output.type = label, ir.TensorType(dtype)
        if bounds is not None:
            node.metadata_props[RANGE_KEY] = f"{bounds[0]} {bounds[1]}"
        self.nodes.append(node)
        return output

    def cast(self, value: ir.Value, dtype: ir.DataType, **options: Any) -> ir.Value:
        """The value in another integer type; itself where it has that type."""
        if value.dtype == dtype:
            return value
        return self.op("Cast", [value], dtype, {"to": int(dtype)}, **options)

    def shift(
        self, value: ir.Value, by: ir.Value, direction: str = "RIGHT", **options: Any
    ) -> ir.Value:
        """BitShift of unsigned integers."""
        assert value.dtype is not None
        return self.op("BitShift", [value, by], value.dtype, {"direction": direction}, **options)

    def reduce(self, op_type: str, value: ir.Value, *over: int, **options: Any) -> ir.Value:
        """ReduceSum or ReduceMax over axes (the last one), which stay with size 1."""
        assert value.dtype is not None
        axes = self.number(over or [-1])
        keep = options.pop("keepdims", 1)
        return self.op(op_type, [value, axes], value.dtype, {"keepdims": keep}, **options)

    def wide(self, value: ir.Value, zero: NDArray[np.int64], alpha: NDArray[np.int64]) -> ir.Value:
        """X = (code - zero) ≪ alpha as int64, made once per tensor.

        code ≪ alpha on unsigned integers, minus zero ≪ alpha.
        """
        key = (value, zero.tobytes(), alpha.tobytes())
        if key not in self._wide:
            shifted = value
            if np.any(alpha):
                shifted = self.cast(value, U32)
                shifted = self.shift(shifted, self.number(alpha, U32), "LEFT")
            shifted = self.cast(shifted, I64)
            if np.any(zero):
                shifted = self.op("Sub", [shifted, self.number(zero << alpha)], I64)
            self._wide[key] = shifted
        return self._wide[key]
