"""Follows elements through layout ops: which column of a linear ends up in which channel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from ptq_onnx.blocks.walking import is_constant, is_layout


def layout_indices(start: ir.Value, end: ir.Value) -> NDArray[np.int64] | None:
    """Flat index into ``start`` of every element of ``end``, both with batch size 1.

    Returns an int64 array with the shape of ``end``, or None where ``end`` is not reached
    from ``start`` by layout ops alone, or the shape depends on more than the batch, or an element
    is of none of ``start``: what a Pad fills in.
    """
    shape = static_shape(start)
    if shape is None:
        return None
    nodes: list[ir.Node] = []
    constants: dict[str, ir.Value] = {}
    if not _collect(end, start, nodes, constants):
        return None
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in nodes],
        "layout",
        [onnx.helper.make_tensor_value_info(str(start.name), onnx.TensorProto.INT64, shape)],
        [onnx.helper.make_tensor_value_info(str(end.name), onnx.TensorProto.INT64, None)],
        [
            onnx.numpy_helper.from_array(value.const_value.numpy(), name)
            for name, value in constants.items()
            if value.const_value is not None
        ],
    )
    opset = 21 if start.graph is None else start.graph.opset_imports.get("", 21)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    # Counted from 1, so that what a Pad fills in (0) is no element
    indices = np.arange(1, int(np.prod(shape)) + 1, dtype=np.int64).reshape(shape)
    try:
        found: list[Any] = list(ReferenceEvaluator(model).run(None, {str(start.name): indices}))
    except (ValueError, IndexError, RuntimeError):  # a target shape that is not of one image
        return None
    filled = np.asarray(found[0])
    if not np.isin(filled, indices).all():
        return None
    return np.asarray(filled, dtype=np.int64) - 1


def channel_map(
    start: ir.Value, end: ir.Value, shape: tuple[int, ...], axis: int = -1
) -> NDArray[np.int64] | None:
    """For a per-channel array of ``shape`` on ``end``: the index along ``axis`` of ``start`` that
    each entry comes from (int64, that shape), or None where one entry mixes several.

    ``shape`` broadcasts against ``end`` without its batch axis, 1 on axes that are shared.
    """
    indices = layout_indices(start, end)
    columns = static_shape(start)
    if indices is None or columns is None:
        return None
    column = np.unravel_index(indices, columns)[axis]
    if not np.array_equal(column, np.broadcast_to(column[:1], column.shape)):
        return None
    column = column[0]
    padded = (1,) * (column.ndim - len(shape)) + shape
    shared = tuple(i for i, size in enumerate(padded) if size == 1)
    low, high = column.min(axis=shared, keepdims=True), column.max(axis=shared, keepdims=True)
    if low.shape != padded or not np.array_equal(low, high):
        return None
    return np.asarray(low.reshape(shape), np.int64)


def varying_axes(start: ir.Value, end: ir.Value) -> tuple[int, ...] | None:
    """The axes of ``end`` along which it holds different channels (last axis) of ``start``; None
    where that is unknown."""
    indices, shape = layout_indices(start, end), static_shape(start)
    if indices is None or shape is None:
        return None
    channels = indices % shape[-1]
    first = [channels.take([0], axis=axis) for axis in range(channels.ndim)]
    return tuple(axis for axis, part in enumerate(first) if (channels != part).any())


def static_shape(value: ir.Value) -> list[int] | None:
    """The shape with batch size 1, or None where it depends on more than the batch.

    The first axis may hold several rows an image (``4*batch`` windows).
    """
    if value.shape is None or len(value.shape) == 0:
        return None
    batch = _batch_name(value)
    sizes: list[int] = []
    for axis, dim in enumerate(value.shape):
        rows = _rows_per_image(dim, batch)
        if rows is None and axis == 0:
            rows = 1
        if rows is None:
            return None
        sizes.append(rows)
    return sizes


def _rows_per_image(dim: int | ir.SymbolicDim, batch: str | None) -> int | None:
    """What ``dim`` is at batch size 1: n for ``n`` and for ``n*batch``; None for anything else."""
    if isinstance(dim, int):
        return dim
    factor, times, name = str(dim.value).rpartition("*")
    if name != batch or (times and not factor.isdecimal()):
        return None
    return int(factor) if times else 1


def _batch_name(value: ir.Value) -> str | None:
    """What the graph calls the first axis of its first input."""
    node = value.producer()
    graph = value.graph if node is None else node.graph
    first = next(iter(graph.inputs), None) if isinstance(graph, ir.Graph) else None
    if first is None or first.shape is None or len(first.shape) == 0:
        return None
    dim = first.shape[0]
    return None if isinstance(dim, int) else dim.value


def is_part(value: ir.Value | None, start: ir.Value) -> bool:
    """Whether all that a tensor holds are elements of ``start``, moved by layout ops: a part of
    it, or parts joined anew (windows that are shifted), and no constant with them."""
    if value is None or value is start:
        return value is start
    node = value.producer()
    if node is None or not is_layout(node) or node.op_type == "Shape":
        return False
    read = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    return all(is_part(item, start) for item in read)


def _collect(
    value: ir.Value, start: ir.Value, nodes: list[ir.Node], constants: dict[str, ir.Value]
) -> bool:
    """Nodes from ``start`` to ``value`` in order; False where something else feeds them."""
    if value is start:
        return True
    if is_constant(value):
        constants[str(value.name)] = value
        return value.const_value is not None
    node = value.producer()
    if node is None or not is_layout(node) or node.op_type == "Shape":
        return False
    if node in nodes:
        return True
    if node.op_type == "Concat" and not all(is_part(item, start) for item in node.inputs):
        return False
    for item in node.inputs:
        if item is not None and not _collect(item, start, nodes, constants):
            return False
    nodes.append(node)
    return True
