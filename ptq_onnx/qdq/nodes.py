"""Puts nodes and constants into a graph, under names that are not taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


@dataclass
class Nodes:
    """Changes one graph in place."""

    graph: ir.Graph
    names: set[str] = field(default_factory=set, kw_only=True)

    def unique(self, name: str) -> str:
        """The name, or with the first number behind it that makes it new; it is taken from then
        on."""
        candidate, n = name, 1
        while candidate in self.names:
            candidate, n = f"{name}_{n}", n + 1
        self.names.add(candidate)
        return candidate

    def constant(self, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
        """A new initializer with the array, its name made unique."""
        name = self.unique(name)
        tensor = ir.Tensor(np.ascontiguousarray(array).reshape(np.shape(array)), name=name)
        value = ir.Value(
            name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)
        )
        self.graph.register_initializer(value)
        return value

    def add(
        self,
        anchor: ir.Node | None,
        op: str,
        inputs: Sequence[ir.Value | None],
        like: ir.Value,
        suffix: str,
        dtype: ir.DataType | None = None,
        attributes: Mapping[str, int | float] | None = None,
    ) -> ir.Value:
        """A node behind ``anchor`` (first in the graph for None); returns its output."""
        name = self.unique(f"{like.name}_{suffix}")
        node = ir.node(op, inputs, attributes or {}, name=f"{name}_node", num_outputs=1)
        output = node.outputs[0]
        output.name, output.shape = name, like.shape
        output.type = like.type if dtype is None else ir.TensorType(dtype)
        if anchor is None:
            first = next(iter(self.graph), None)
            if first is None:
                self.graph.append(node)
            else:
                self.graph.insert_before(first, node)
        else:
            self.graph.insert_after(anchor, node)
        return output

    def chain(
        self,
        start: ir.Value,
        steps: Iterable[tuple[str, list[ir.Value | None], str, ir.DataType | None]],
        like: ir.Value,
    ) -> ir.Value:
        """Nodes one behind the other; each takes the value so far as its first input."""
        value = start
        for op, others, suffix, dtype in steps:
            value = self.add(value.producer(), op, [value, *others], like, suffix, dtype)
        return value


@dataclass
class Behind:
    """The builder (``numerics/builder.py``) that starts behind a node, and names after ``like``."""

    nodes: Nodes
    like: ir.Value
    anchor: ir.Node | None

    def constant(self, suffix: str, array: NDArray[Any] | np.generic) -> ir.Value:
        """A new initializer, named after the value and ``suffix``."""
        return self.nodes.constant(f"{self.like.name}_{suffix}", array)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        suffix: str,
        *,
        dtype: np.dtype[Any] | None = None,
        single: int | None = None,
        shaped: bool = True,
    ) -> ir.Value:
        """A node behind the last one written; ``single``: the axis of which its output keeps one
        entry, ``shaped`` False: its output's shape is left open."""
        kind = None if dtype is None else ir.DataType.from_numpy(dtype)
        output = self.nodes.add(self.anchor, op_type, inputs, self.like, suffix, kind)
        self.anchor = output.producer()
        if not shaped:
            output.shape = None
        elif single is not None and self.like.shape is not None:
            sizes = list(self.like.shape)
            sizes[single] = 1
            output.shape = ir.Shape(sizes)
        return output

    def quantize_dynamically(self, value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Codes, scale and zero point of a DynamicQuantizeLinear behind the last node written."""
        codes = self.op("DynamicQuantizeLinear", [value], "quantized", dtype=np.dtype(np.uint8))
        node = codes.producer()
        assert node is not None
        node.resize_outputs(3)
        for output, suffix, kind in zip(
            node.outputs[1:],
            ("scale", "zero_point"),
            (ir.DataType.FLOAT, ir.DataType.UINT8),
            strict=True,
        ):
            output.name = self.nodes.unique(f"{self.like.name}_{suffix}")
            output.shape, output.type = ir.Shape([]), ir.TensorType(kind)
        return node.outputs[0], node.outputs[1], node.outputs[2]

    def cast(self, value: ir.Value, suffix: str, dtype: np.dtype[Any]) -> ir.Value:
        """A Cast behind the last node written."""
        kind = ir.DataType.from_numpy(dtype)
        output = self.nodes.add(
            self.anchor, "Cast", [value], self.like, suffix, kind, {"to": int(kind)}
        )
        self.anchor = output.producer()
        return output

    def size(self, axis: int) -> int:
        """Entries of the value along ``axis``; 0 where that is not known."""
        shape = self.like.shape
        if shape is None or not -len(shape) <= axis < len(shape):
            return 0
        found = shape[axis]
        return found if isinstance(found, int) else 0


def remove_unused(graph: ir.Graph) -> None:
    """Drop initializers that nothing reads."""
    for name in [n for n, v in graph.initializers.items() if not v.uses()]:
        if not graph.initializers[name].is_graph_output():
            del graph.initializers[name]
