"""Follows elements through layout ops: which column of a linear ends up in which channel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from ptq_onnx.blocks.walking import is_constant, is_layout

KEPT_ELEMENTS = 1 << 19
"""The largest tensor whose way is kept in mind."""
KEPT_WAYS = 24
"""So many of them: the blocks of a network move elements alike."""
Indices = NDArray[np.int64]


def layout_indices(start: ir.Value, end: ir.Value) -> Indices | None:
    """Flat index into ``start`` of every element of ``end``, both with batch size 1.

    Returns an int64 array with the shape of ``end``, not to be changed, or None where ``end`` is
    not reached from ``start`` by layout ops alone, or the shape depends on more than the batch, or
    an element is of none of ``start``: what a Pad fills in.
    """
    found = _way(start, end)
    return None if found is None else _of(_followed, found)


def channel_map(
    start: ir.Value, end: ir.Value, shape: tuple[int, ...], axis: int = -1
) -> Indices | None:
    """For a per-channel array of ``shape`` on ``end``: the index along ``axis`` of ``start`` that
    each entry comes from (int64, that shape, not to be changed), or None where one entry mixes
    several.

    ``shape`` broadcasts against ``end`` without its batch axis, 1 on axes that are shared.
    """
    found = _way(start, end)
    return None if found is None else _of(_channels, found, shape, axis)


@dataclass(frozen=True)
class _Way:
    """Layout ops as a model of anonymous tensors, and the shape of what they start from."""

    model: bytes
    shape: tuple[int, ...]


def _of(function: Any, way: _Way, *more: Any) -> Indices | None:
    """What a function of a way gives, computed once where the tensor is not too large to keep."""
    small = np.prod(way.shape) <= KEPT_ELEMENTS
    found: Indices | None = (function if small else function.__wrapped__)(way, *more)
    return found


def _way(start: ir.Value, end: ir.Value) -> _Way | None:
    """The layout ops between two tensors; None where there are others or sizes are unknown."""
    shape = static_shape(start)
    if shape is None:
        return None
    nodes: list[ir.Node] = []
    constants: dict[str, ir.Value] = {}
    if not _collect(end, start, nodes, constants):
        return None
    names: dict[str, str] = {"": ""}
    protos = [ir.serde.serialize_node(node) for node in nodes]
    for node in protos:
        node.name = node.doc_string = ""
        del node.metadata_props[:]
        for values in (node.input, node.output):
            values[:] = [names.setdefault(name, f"t{len(names)}") for name in values]
    ends = [names.setdefault(str(value.name), f"t{len(names)}") for value in (start, end)]
    infos = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT64, None) for n in ends]
    graph = onnx.helper.make_graph(
        protos,
        "layout",
        infos[:1],
        infos[1:],
        [
            onnx.numpy_helper.from_array(value.const_value.numpy(), names[name])
            for name, value in constants.items()
            if value.const_value is not None
        ],
    )
    opset = 21 if start.graph is None else start.graph.opset_imports.get("", 21)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return _Way(model.SerializeToString(deterministic=True), tuple(shape))


@lru_cache(KEPT_WAYS)
def _followed(way: _Way) -> Indices | None:
    """The indices at the end of a way."""
    model = onnx.ModelProto.FromString(way.model)
    count = int(np.prod(way.shape))
    # Counted from 1, so that what a Pad fills in (0) is no element
    indices = np.arange(1, count + 1, dtype=np.int64).reshape(way.shape)
    try:
        found: list[Any] = list(
            ReferenceEvaluator(model).run(None, {model.graph.input[0].name: indices})
        )
    except (ValueError, IndexError, RuntimeError):  # a target shape that is not of one image
        return None
    filled = np.asarray(found[0])
    if filled.dtype.kind not in "iu" or filled.min(initial=1) < 1 or filled.max(initial=1) > count:
        return None
    result = np.asarray(filled, dtype=np.int64) - 1
    result.setflags(write=False)
    return result


@lru_cache(KEPT_WAYS)
def _channels(way: _Way, shape: tuple[int, ...], axis: int) -> Indices | None:
    """What :func:`channel_map` gives."""
    indices = _of(_followed, way)
    if indices is None:
        return None
    place = axis % len(way.shape)
    column = indices // int(np.prod(way.shape[place + 1 :])) % way.shape[place]
    if len(column) > 1 and not np.array_equal(column, np.broadcast_to(column[:1], column.shape)):
        return None
    column = column[0]
    padded = (1,) * (column.ndim - len(shape)) + shape
    shared = tuple(i for i, size in enumerate(padded) if size == 1)
    low, high = column.min(axis=shared, keepdims=True), column.max(axis=shared, keepdims=True)
    if low.shape != padded or not np.array_equal(low, high):
        return None
    result = np.asarray(low.reshape(shape), np.int64)
    result.setflags(write=False)
    return result


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
