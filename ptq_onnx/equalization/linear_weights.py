"""Columns and rows of linears: whose they are, and new weights that take in shifts and factors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.element_map import layout_indices
from ptq_onnx.blocks.walking import name_of, through_layout
from ptq_onnx.equalization.padding import pads_of
from ptq_onnx.graph.formula import constant, new_constant


def own_columns(linear: ir.Node, value: ir.Value) -> NDArray[np.int64] | None:
    """The columns of a linear that end up in ``value``, which one node reads, and nowhere else."""
    output = linear.outputs[0]
    if output.is_graph_output() or output.shape is None:
        return None
    if len(value.uses()) != 1 or value.is_graph_output():
        return None
    width = output.shape[-1]
    if not isinstance(width, int):
        return None
    mine = columns_of(output, value, width)
    if mine is None:
        return None
    for node, index in through_layout(output):
        read = node.inputs[index]
        if read is value or read is None:
            continue
        other = columns_of(output, read, width)
        if other is None or np.intersect1d(mine, other).size:
            return None
    return mine


def columns_of(start: ir.Value, end: ir.Value, width: int) -> NDArray[np.int64] | None:
    """Sorted last-axis indices of ``start`` that ``end`` holds, or None where unknown."""
    indices = layout_indices(start, end)
    return None if indices is None else np.unique(indices % width)


def scale_columns(
    graph: ir.Graph,
    linear: ir.Node,
    columns: NDArray[np.int64],
    factor: NDArray[np.float64] | np.float64,
    shift: NDArray[np.float64] | np.float64 | None = None,
) -> None:
    """Columns of the linear's output become (y - shift) / factor ([columns] each)."""
    weight = _weight(linear)
    new = weight.astype(np.float64)
    new[:, columns] /= factor
    bias = bias_of(linear, weight.shape[1])
    bias[columns] = (bias[columns] - (0 if shift is None else shift)) / factor
    set_linear(graph, linear, new, bias)


def turn_columns(
    graph: ir.Graph, linear: ir.Node, heads: NDArray[np.int64], rotation: NDArray[np.float64]
) -> None:
    """Columns [H, d] of the linear's output become y R, head by head."""
    weight = _weight(linear)
    new = weight.astype(np.float64)
    bias = bias_of(linear, weight.shape[1])
    new[:, heads] = new[:, heads] @ rotation
    bias[heads] = bias[heads] @ rotation
    set_linear(graph, linear, new, bias)


def move_rows(
    graph: ir.Graph,
    linear: ir.Node,
    factor: NDArray[np.float64],
    shift: NDArray[np.float64],
) -> None:
    """The linear for inputs that have become (x - shift) / factor ([K] each)."""
    weight = _weight(linear)
    old = weight.astype(np.float64)
    bias = bias_of(linear, weight.shape[1]) + shift @ old
    set_linear(graph, linear, old * factor[:, None], bias)


def turn_rows(
    graph: ir.Graph, linear: ir.Node, heads: NDArray[np.int64], rotation: NDArray[np.float64]
) -> None:
    """The linear for inputs whose rows [H, d] have become x R, R being orthogonal."""
    weight = _weight(linear)
    new = weight.astype(np.float64)
    new[heads] = rotation.T @ new[heads]
    set_linear(graph, linear, new, bias_of(linear, weight.shape[1]))


def move_input_channels(
    graph: ir.Graph, conv: ir.Node, factor: NDArray[np.float64], shift: NDArray[np.float64]
) -> None:
    """The convolution for images that have become (x - shift) / factor ([channels] each).

    A shift is exact only where nothing is padded: padding stays zero, which then stands for
    ``shift``. Raises ValueError there; :func:`pad_apart` takes the padding out.
    """
    weight = _weight(conv)
    if np.any(shift) and pads_of(conv) != 0:
        raise ValueError(f"'{name_of(conv)}' pads with zeros, which a shift would move.")
    old = weight.astype(np.float64)
    bias = np.zeros(len(old))
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        bias = np.array(constant(conv.inputs[2]), np.float64)
    # Channels that each output reads, [O, C / groups]: those of its group
    groups = conv.attributes.get_int("group", 1)
    read = np.arange(len(factor)).reshape(groups, -1).repeat(len(old) // groups, axis=0)
    spread = (*read.shape, *(1,) * (old.ndim - 2))
    bias = bias + np.sum(old * shift[read].reshape(spread), axis=tuple(range(1, old.ndim)))
    set_linear(graph, conv, old * factor[read].reshape(spread), bias)


def _weight(node: ir.Node) -> NDArray[Any]:
    """The weight of a linear or convolution. Raises ValueError where it is computed."""
    found = constant(node.inputs[1])
    if found is None:
        raise ValueError(f"The weight of '{name_of(node)}' is not a constant.")
    return found


def bias_of(linear: ir.Node, width: int) -> NDArray[np.float64]:
    """The bias of a linear, float64 [``width``]; zeros where it has none."""
    found = constant(linear.inputs[2]) if len(linear.inputs) > 2 else None
    return np.zeros(width) if found is None else np.array(found, np.float64)


def power_of_rows(linears: Iterable[ir.Node], channels: int) -> NDArray[np.float64]:
    """Σ W² over the columns of all linears that read so many channels, [channels]."""
    power = np.zeros(channels)
    for linear in linears:
        weight = constant(linear.inputs[1])
        if weight is not None and len(weight) == channels:
            power += np.sum(np.asarray(weight, np.float64) ** 2, axis=1)
    return power


def set_linear(
    graph: ir.Graph, linear: ir.Node, weight: NDArray[np.float64], bias: NDArray[np.float64]
) -> None:
    """Give a linear a weight and a bias of its own, float32."""
    values = [weight.astype(np.float32), bias.astype(np.float32)]
    for index, (array, suffix) in enumerate(zip(values, ("weight", "bias"), strict=True), 1):
        old = linear.inputs[index] if len(linear.inputs) > index else None
        name = f"{name_of(linear)}_{suffix}" if old is None else str(old.name)
        if old is not None and len(old.uses()) == 1:
            old.const_value = ir.tensor(array, name=old.name)
            old.shape = ir.Shape(array.shape)
            continue
        value = new_constant(graph, name, array)
        if old is None and len(linear.inputs) <= index:
            linear.resize_inputs(index + 1)
        linear.replace_input_with(index, value)
