"""Where the channels of an op's input are in its output, and the other way round."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from ptq_onnx.graph.formula import constant, sizes

SAME = frozenset(["Identity", "Cast", "Dropout", "Tile", "Pad", "Slice", "Split", "Concat"])
BROADCAST = frozenset(["Add", "Sub", "Mul", "Div", "Expand"])
RESHAPES = frozenset(["Reshape", "Flatten", "Squeeze", "Unsqueeze"])
REDUCTIONS = frozenset(["ReduceMean", "ReduceSum", "GlobalAveragePool"])
LINEAR_IN_CHANNELS = SAME | BROADCAST | RESHAPES | REDUCTIONS | {"Transpose", "Gather"}
"""Ops that treat all channels alike, where they leave the channels' axis alone."""


def channels_of(value: ir.Value | None, axis: int) -> int | None:
    """The size of an axis; None where it is not known."""
    shape = sizes(value)
    size = None if shape is None or not 0 <= axis < len(shape) else shape[axis]
    return size if isinstance(size, int) else None


def along_channels(concat: ir.Node, axis: int) -> bool:
    """True for a Concat along the channels' axis."""
    rank = len(sizes(concat.outputs[0]) or [1])
    return concat.attributes.get_int("axis", 0) % rank == axis


def is_arithmetic(node: ir.Node) -> bool:
    """True for an op of two operands."""
    return node.op_type in ("Add", "Sub", "Mul", "Div")


def axis_behind(node: ir.Node, index: int, axis: int, width: int) -> int | None:
    """The axis of the first output that ``axis`` of input ``index`` becomes; None where the op
    does not leave blocks of ``width`` channels together."""
    if _touches(node, axis, index):
        return None
    before, after = sizes(node.inputs[index]), sizes(node.outputs[0])
    if before is None or after is None:
        return None
    return _map(node, before, after, axis, width, forward=True)


def axis_before(node: ir.Node, index: int, axis: int, width: int) -> int | None:
    """The axis of input ``index`` that ``axis`` of the first output comes from; else None."""
    before, after = sizes(node.inputs[index]), sizes(node.outputs[0])
    if before is None or after is None:
        return None
    found = _map(node, before, after, axis, width, forward=False)
    return None if found is None or _touches(node, found, index) else found


def _map(
    node: ir.Node,
    before: list[int | str],
    after: list[int | str],
    axis: int,
    width: int,
    *,
    forward: bool,
) -> int | None:
    op = node.op_type
    if op in SAME:
        return axis
    if op in BROADCAST:
        shift = len(after) - len(before)
        found = axis + shift if forward else axis - shift
        return found if found >= 0 else None
    if op == "Transpose":
        order = list(node.attributes.get_ints("perm", list(range(len(before)))[::-1]))
        return order.index(axis) if forward else order[axis]
    if op in RESHAPES:
        return _reshaped(*((before, after) if forward else (after, before)), axis, width)
    if op == "Gather":
        at = node.attributes.get_int("axis", 0) % len(before)
        more = len(after) - len(before)
        if forward:
            return axis if axis < at else axis + more
        return axis if axis < at else axis - more if axis > at + more else None
    if op in REDUCTIONS:
        gone = reduced_axes(node, len(before))
        if gone is None:
            return None
        left = [a for a in range(len(before)) if a not in gone or len(before) == len(after)]
        if forward:
            return left.index(axis) if axis in left else None
        return left[axis]
    return None


def reduced_axes(node: ir.Node, rank: int) -> frozenset[int] | None:
    """The axes that a reduction takes together; None where they are not constant."""
    if node.op_type == "GlobalAveragePool":
        return frozenset(range(2, rank))
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    found: Sequence[int] | None = node.attributes.get_ints("axes", None)
    if given is not None:
        found = [int(a) for a in given.ravel()]
    return None if found is None else frozenset(a % rank for a in found)


def _reshaped(before: list[int | str], after: list[int | str], axis: int, width: int) -> int | None:
    """The axis whose blocks of ``width`` are those of ``axis``: as much lies inside of both."""
    inner = _inner(before, axis)
    for place, size in enumerate(after):
        if isinstance(size, int) and size % width == 0 and inner == _inner(after, place) != -1:
            return place
    return None


def _inner(shape: list[int | str], axis: int) -> int:
    """Elements from one index of an axis to the next; -1 where that is not known."""
    inside = [d for d in shape[axis + 1 :] if isinstance(d, int)]
    return math.prod(inside) if len(inside) == len(shape) - axis - 1 else -1


def _touches(node: ir.Node, axis: int, index: int) -> bool:
    """Whether an op does something along an axis of its input."""
    op, shape = node.op_type, sizes(node.inputs[index])
    if not shape:
        return True
    rank = len(shape)
    if op in ("Gather", "Split"):
        return node.attributes.get_int("axis", 0) % rank == axis
    if op == "Slice":
        axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
        if axes is not None:
            return axis in {int(a) % rank for a in axes.ravel()}
        starts = constant(node.inputs[1])
        return starts is None or axis < starts.size
    if op in REDUCTIONS:
        gone = reduced_axes(node, rank)
        return gone is None or axis in gone
    if op in ("Pad", "Tile", "Expand"):
        return channels_of(node.inputs[index], axis) != channels_of(
            node.outputs[0], axis + (len(sizes(node.outputs[0]) or []) - rank)
        )
    return False
