"""Moves (x - t) / f into what makes a tensor and what reads it: equal in float, free at run time.

Into LayerNormalization: γ / f, (β - t) / f. Into the columns of the linear that makes it:
W / f, (b - t) / f. Into the rows of the linears that read it: f W, b + t W. Where nothing
takes it in (GELU): one Mul, or Mul and Add.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import rows_of
from ptq_onnx.blocks.element_map import channel_map
from ptq_onnx.blocks.role_map import Role
from ptq_onnx.blocks.walking import (
    ACTIVATIONS,
    is_layout,
    is_linear,
    is_product,
    is_row_factors,
    name_of,
    source,
    through_layout,
)
from ptq_onnx.calibration.mean_centred import rows_sum_to_one
from ptq_onnx.equalization.linear_weights import (
    bias_of,
    move_rows,
    own_columns,
    scale_columns,
    set_linear,
    turn_columns,
)
from ptq_onnx.graph.formula import constant, new_constant, unique_name

Double = NDArray[np.float64]


@dataclass(frozen=True)
class Norm:
    """A LayerNormalization whose output only ``linears`` read, perhaps through layout ops."""

    node: ir.Node
    linears: tuple[ir.Node, ...]

    def apply(self, graph: ir.Graph, shift: Double, factor: Double) -> None:
        """Move shift and factor [C] from the norm into the linears."""
        width = len(factor)
        for index, neutral in ((1, 1.0), (2, 0.0)):
            old = constant(self.node.inputs[index]) if len(self.node.inputs) > index else None
            values = np.full(width, neutral) if old is None else np.array(old, np.float64)
            new = values / factor if index == 1 else (values - shift) / factor
            suffix = "scale" if index == 1 else "bias"
            value = new_constant(graph, f"{name_of(self.node)}_{suffix}", new.astype(np.float32))
            if len(self.node.inputs) <= index:
                self.node.resize_inputs(index + 1)
            self.node.replace_input_with(index, value)
        for linear in self.linears:
            move_rows(graph, linear, factor, shift)

    def on_grid(self, factor: Double, steps: int) -> Double:
        """Factors near these that leave γ whole multiples of one step, of which its range has
        ``steps``: rounding γ to codes then loses nothing. None becomes zero."""
        gamma = np.array(constant(self.node.inputs[1]), np.float64)
        wanted = gamma / factor
        step = (max(wanted.max(), 0) - min(wanted.min(), 0)) / steps
        if step == 0:
            return factor
        whole = np.sign(wanted) * np.maximum(np.round(np.abs(wanted) / step), 1)
        return np.where(gamma == 0, factor, gamma / np.where(gamma == 0, 1, whole * step))


def norm_before(value: ir.Value) -> Norm | None:
    """The norm whose output ``value`` is, if it takes factors of the last axis.

    None where the norm's output is read by anything but linears (as data), on any way.
    """
    node = source(value)
    if node is None or node.op_type != "LayerNormalization":
        return None
    start = node.outputs[0]
    if start.is_graph_output() or any(v.uses() for v in node.outputs[1:]):
        return None
    rank = None if start.shape is None else len(start.shape)
    if node.attributes.get_int("axis", -1) not in (-1, (rank or 0) - 1):
        return None
    leaves = list(through_layout(start))
    width = None if start.shape is None else start.shape[-1]
    linears: list[ir.Node] = []
    for reader, index in leaves:
        read = reader.inputs[index]
        if not is_linear(reader) or index != 0 or read is None:
            return None
        if read is not start and not _keeps_channels(start, read, width):
            return None
        if reader not in linears:
            linears.append(reader)
    return Norm(node, tuple(linears)) if linears else None


def _keeps_channels(start: ir.Value, read: ir.Value, width: object) -> bool:
    """True where the last axis of ``read`` is that of ``start``."""
    if not isinstance(width, int):
        return False
    node = read.producer()
    while node is not None and is_layout(node) and node.outputs[0] is not start:
        if node.op_type == "Concat":
            return False
        before = node.inputs[0]
        node = None if before is None else before.producer()
    found = rows_of(start, read, np.arange(width, dtype=np.float32))
    return found is not None and np.array_equal(found, np.arange(width))


@dataclass(frozen=True)
class Columns:
    """The columns of a linear that make a tensor, in the shape of its channels."""

    linear: ir.Node
    columns: NDArray[np.int64]

    def apply(self, graph: ir.Graph, shift: Double, factor: Double) -> None:
        """Divide the columns; entries [C] that share one must agree."""
        flat, first = np.unique(self.columns.ravel(), return_index=True)
        scale_columns(graph, self.linear, flat, factor[first], shift[first])

    def turn(self, graph: ir.Graph, rotation: Double) -> None:
        """Turn the channels of every head, rows of ``columns`` [H, d] without the axes of size 1,
        by ``rotation`` [d, d]: y becomes y R."""
        turn_columns(graph, self.linear, self.columns.reshape(-1, len(rotation)), rotation)


def columns_behind(value: ir.Value, shape: tuple[int, ...]) -> Columns | None:
    """The linear's columns that ``value`` is, through layout ops alone, read nowhere else."""
    linear = source(value)
    if linear is None or not is_linear(linear) or own_columns(linear, value) is None:
        return None
    columns = channel_map(linear.outputs[0], value, shape)
    return None if columns is None else Columns(linear, columns)


def readers_behind(value: ir.Value) -> tuple[ir.Node, ...] | None:
    """The linears that alone read ``value``, directly or times factors of its rows."""
    uses = list(value.uses())
    scaled = len(uses) == 1 and is_row_factors(uses[0].node) and not value.is_graph_output()
    return readers_of(uses[0].node.outputs[0] if scaled else value)


def readers_of(value: ir.Value) -> tuple[ir.Node, ...] | None:
    """The linears that alone read ``value``, directly; None where something else does."""
    found = [use.node for use in value.uses()]
    alone = all(is_linear(n) and n.inputs[0] is value for n in found)
    return tuple(found) if found and alone and not value.is_graph_output() else None


@dataclass(frozen=True)
class Hidden:
    """The channels between a linear, one elementwise activation, and the linears behind it."""

    before: ir.Node
    activation: ir.Node
    after: tuple[ir.Node, ...]

    def repeat(self, graph: ir.Graph, copies: NDArray[np.int64]) -> None:
        """Copy channel c ``copies[c]`` times; each copy counts 1 / copies[c] behind."""
        self._widen(graph, copies, copies, np.zeros(int(copies.sum())))

    def divide(self, graph: ir.Graph, pieces: NDArray[np.int64], bound: float) -> None:
        """Copy channel c ``pieces[c]`` times, copy i with i · ``bound`` less in front of the
        activation; each counts in full behind."""
        before = np.repeat(np.cumsum(pieces) - pieces, pieces)
        place = np.arange(int(pieces.sum())) - before
        self._widen(graph, pieces, np.ones_like(pieces), np.asarray(place * bound, np.float64))

    def keep_bias(self, graph: ir.Graph, at: float) -> None:
        """Make the bias of the linear behind a hidden channel that is ``at`` everywhere, where
        f(x) = x: whatever multiplies rows of the hidden layer multiplies it too."""
        (linear,) = self.after
        before, after = (constant(n.inputs[1]) for n in (self.before, linear))
        assert before is not None
        assert after is not None
        bias = bias_of(linear, after.shape[1])
        if not bias.any():
            return
        wide = np.concatenate([before.astype(np.float64), np.zeros((len(before), 1))], axis=1)
        on = np.append(bias_of(self.before, before.shape[1]), at)
        set_linear(graph, self.before, wide, on)
        rows = np.concatenate([after.astype(np.float64), bias[None] / at])
        set_linear(graph, linear, rows, np.zeros_like(bias))
        self._set_width(len(rows))

    def _set_width(self, width: int) -> None:
        """Tell the tensors of the hidden layer how many channels they have."""
        behind = [v for linear in self.after if (v := linear.inputs[0]) is not None]
        for value in dict.fromkeys([self.before.outputs[0], self.activation.outputs[0], *behind]):
            assert value.shape is not None
            value.shape = ir.Shape([*list(value.shape)[:-1], width])

    def _widen(
        self,
        graph: ir.Graph,
        copies: NDArray[np.int64],
        parts: NDArray[np.int64],
        less: NDArray[np.float64],
    ) -> None:
        """Copies of channels: ``less`` [Σ copies] in front, 1 / ``parts`` [C] of each behind."""
        index = np.repeat(np.arange(len(copies)), copies)
        weight = constant(self.before.inputs[1])
        assert weight is not None
        wide = bias_of(self.before, weight.shape[1])[index]
        set_linear(graph, self.before, weight.astype(np.float64)[:, index], wide - less)
        for linear in self.after:
            matrix = constant(linear.inputs[1])
            assert matrix is not None
            rows = matrix.astype(np.float64)[index] / parts[index][:, None]
            set_linear(graph, linear, rows, bias_of(linear, matrix.shape[1]))
        self._set_width(len(index))


def hidden_channels(value: ir.Value, linears: tuple[ir.Node, ...]) -> Hidden | None:
    """The hidden channels that ``value``, an activation's output, holds; None for others."""
    node = value.producer()
    if node is None or node.op_type not in ACTIVATIONS or len(node.inputs) != 1:
        return None
    data = node.inputs[0]
    linear = None if data is None else data.producer()
    if data is None or linear is None or not is_linear(linear):
        return None
    if len(data.uses()) != 1 or data.is_graph_output() or value.shape is None:
        return None
    return Hidden(linear, node, linears)


def insert_affine(
    graph: ir.Graph,
    value: ir.Value,
    shift: NDArray[np.generic],
    factor: NDArray[np.generic],
    suffix: str,
) -> ir.Value:
    """(value - shift) / factor behind a value, as Mul and Add; its data readers get the result.

    Shift and factor broadcast against the value. A Mul by one or an Add of zero is left out.
    """
    readers = [(u.node, u.idx) for u in value.uses() if u.node.op_type != "Shape"]
    current, last = value, value.producer()
    parts = [("Mul", 1 / factor.astype(np.float64), 1.0)]
    parts.append(("Add", -shift.astype(np.float64) / factor.astype(np.float64), 0.0))
    for op, number, neutral in parts:
        if np.all(number == neutral):
            continue
        name = unique_name(graph, f"{value.name}_{suffix}" + ("" if op == "Mul" else "_shifted"))
        array = new_constant(graph, f"{name}_constant", number.astype(np.float32))
        node = ir.node(op, [current, array], name=f"{name}_node")
        output = node.outputs[0]
        output.name, output.type, output.shape = name, value.type, value.shape
        if last is None:
            graph.insert_before(next(iter(graph)), node)
        else:
            graph.insert_after(last, node)
        current, last = output, node
    for node, index in readers:
        node.replace_input_with(index, current)
    return current


@contextmanager
def new_nodes_as(graph: ir.Graph, role: Role, roles: dict[str, Role]) -> Iterator[None]:
    """Nodes that are put into the graph meanwhile have a role, by name."""
    before = {name_of(node) for node in graph}
    yield
    after = (name_of(node) for node in graph)
    roles.update(dict.fromkeys((name for name in after if name not in before), role))


def value_path(value: ir.Value) -> tuple[ir.Node, ir.Node] | None:
    """The A·V product that reads ``value`` as V behind a softmax, and the linear behind it.

    None unless the rows of A sum to one and the product feeds that linear alone.
    """
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    product = uses[0].node
    if not is_product(product) or uses[0].idx != 1:
        return None
    if not rows_sum_to_one(product):
        return None
    leaves = list(through_layout(product.outputs[0]))
    if len(leaves) != 1 or not is_linear(leaves[0][0]) or leaves[0][1] != 0:
        return None
    return product, leaves[0][0]


def keys_may_shift(product: ir.Node) -> bool:
    """True where a constant added to every key changes no softmax: only scales and added
    masks stand between QKᵀ and a softmax over the last axis."""
    value = product.outputs[0]
    for _ in range(8):
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            return False
        node = uses[0].node
        if node.op_type == "Softmax":
            rank = 0 if value.shape is None else len(value.shape)
            return node.attributes.get_int("axis", -1) in (-1, rank - 1)
        if node.op_type not in ("Mul", "Div", "Add"):
            return False
        others = [v for v in node.inputs if v is not value]
        if node.op_type != "Add":
            array = constant(others[0]) if others else None
            if array is None or array.size != 1:
                return False
        value = node.outputs[0]
    return False
