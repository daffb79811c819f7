"""The shape of a node's output, by its op."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import onnx_ir as ir

from ptq_onnx.graph.symbolic_dims import Data, Dim, Shape, Tie, product_of, quotient, tidy

Found = list[Shape | None] | None


class Known(Protocol):
    """What is known of the values of a graph before a node."""

    ties: list[Tie]

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The shape of a value."""

    def content(self, value: ir.Value | None) -> Data | None:
        """The elements of a small integer tensor."""

    def numbers(self, value: ir.Value | None) -> list[int] | None:
        """The same, where all are plain integers."""

    def axes(self, node: ir.Node) -> list[int] | None:
        """The axes that a node is given, as attribute or input."""


BROADCAST = frozenset((
    "Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "Where", "Equal", "Less", "Greater",
    "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor", "PRelu", "BitwiseAnd", "BitwiseOr",
))  # fmt: skip


def broadcast(shapes: Sequence[Shape], keep: bool = False) -> Shape | None:
    """The shape that the shapes broadcast to; None where two sizes of one axis may differ.

    Of several sizes other than 1, a number counts as what the dynamic ones must be; with
    ``keep`` the dynamic one is kept.
    """
    rank = max((len(s) for s in shapes), default=0)
    result: list[Dim] = []
    for position in range(rank):
        dims = [s[position - rank] for s in shapes if rank - position <= len(s)]
        wide = list(dict.fromkeys(d for d in dims if d != 1))
        if len(wide) > 1:
            wide = [d for d in wide if isinstance(d, int) != keep][:1]
            if not wide:
                return None
        result.append(wide[0] if wide else 1)
    return tuple(result)


def _matmul(known: Known, node: ir.Node, first: Shape) -> Found:
    second = known.shape(node.inputs[1])
    if second is None or len(first) < 2 or len(second) < 2:
        return None
    for dynamic, fixed, value in (
        (first[-1], second[-2], node.inputs[1]),
        (second[-2], first[-1], node.inputs[0]),
    ):
        if not isinstance(dynamic, int) and isinstance(fixed, int) and value is not None:
            known.ties.append(Tie(dynamic, fixed, value))
    outer = broadcast([first[:-2], second[:-2]])
    return None if outer is None else [(*outer, first[-2], second[-1])]


def _linear(known: Known, node: ir.Node, first: Shape) -> Found:
    weight = known.shape(node.inputs[1])
    return None if weight is None else [(*first[:-1], weight[-1])]


def _gemm(known: Known, node: ir.Node, first: Shape) -> Found:
    weight = known.shape(node.inputs[1])
    if weight is None:
        return None
    rows = first[1 if node.attributes.get_int("transA", 0) else 0]
    return [(rows, weight[0 if node.attributes.get_int("transB", 0) else 1])]


def _reshape(known: Known, node: ir.Node, first: Shape) -> Found:
    target = known.content(node.inputs[1])
    if target is None:
        return None
    copies = not node.attributes.get_int("allowzero", 0)
    dims = [first[i] if copies and d == 0 else d for i, d in enumerate(target.ravel())]
    if -1 in dims:
        index = dims.index(-1)
        dims[index] = quotient(product_of(first), product_of([d for d in dims if d != -1]))
    if node.outputs[0].name and len(first) > 1 and len(dims) > 1:
        known.ties += _cuts(node.outputs[0], first, dims)
    return [tuple(tidy(d) for d in dims)]


def _cuts(value: ir.Value, first: Shape, dims: Sequence[Dim]) -> list[Tie]:
    """The ties of a Reshape that cuts one dynamic size into fixed ones behind the batch."""
    before, after = list(first[1:]), list(dims[1:])
    for size in list(before):
        if size in after:
            before.remove(size)
            after.remove(size)
    if len(before) != 1 or isinstance(before[0], int) or not after:
        return []
    if not all(isinstance(d, int) and d > 0 for d in after):
        return []
    return [Tie(before[0], product_of(after), value, tuple(after))]


def _transpose(known: Known, node: ir.Node, first: Shape) -> Found:
    perm = node.attributes.get_ints("perm") or range(len(first))[::-1]
    return [tuple(first[i] for i in perm)]


def _join(known: Known, node: ir.Node, first: Shape) -> Found:
    shapes = [known.shape(v) for v in node.inputs]
    if None in shapes:
        return None
    axis = node.attributes.get_int("axis", 0) % len(first)
    total = tidy(sum(s[axis] for s in shapes if s is not None))
    return [(*first[:axis], total, *first[axis + 1 :])]


def _pick(known: Known, node: ir.Node, first: Shape) -> Found:
    indices = known.shape(node.inputs[1])
    axis = node.attributes.get_int("axis", 0) % len(first)
    return None if indices is None else [(*first[:axis], *indices, *first[axis + 1 :])]


def _cut(known: Known, node: ir.Node, first: Shape) -> Found:
    inputs = [known.content(v) for v in node.inputs[1:]]
    if any(i is None for i in inputs[:2]):
        return None
    starts, ends = ([*i.ravel()] for i in inputs[:2] if i is not None)
    axes = known.numbers(node.inputs[3]) if len(node.inputs) > 3 else list(range(len(starts)))
    steps = known.numbers(node.inputs[4]) if len(node.inputs) > 4 else [1] * len(starts)
    if axes is None or steps is None:
        return None
    dims = list(first)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = dims[axis]
        if all(isinstance(x, int) for x in (start, end, size)):
            dims[axis] = len(range(*slice(start, end, step).indices(size)))
        elif step == 1 and isinstance(start, int):
            low = start if start >= 0 else size + start
            if isinstance(end, int) and end >= 2**31 - 1:
                dims[axis] = tidy(size - low)
            elif isinstance(end, int) and end < 0:
                dims[axis] = tidy(size + end - low)
            elif not isinstance(end, int) and end == size:
                dims[axis] = tidy(size - low)
            elif not isinstance(end, int) and (size - end).is_nonnegative:
                dims[axis] = tidy(end - low)
            else:
                return None
        else:
            return None
    return [tuple(dims)]


def _pieces(known: Known, node: ir.Node, first: Shape) -> Found:
    axis = node.attributes.get_int("axis", 0) % len(first)
    lengths = known.numbers(node.inputs[1]) if len(node.inputs) > 1 else None
    given = node.attributes.get_ints("split")
    if lengths is None and given is not None:
        lengths = list(given)
    if lengths is None:
        size, count = first[axis], len(node.outputs)
        if not isinstance(size, int):
            return None
        step = -(-size // count)
        lengths = [min(step, size - i * step) for i in range(count)]
    return [(*first[:axis], length, *first[axis + 1 :]) for length in lengths]


def _squeeze(known: Known, node: ir.Node, first: Shape) -> Found:
    axes = known.axes(node)
    if axes is None:
        return [tuple(d for d in first if d != 1)]
    gone = [a % len(first) for a in axes]
    return [tuple(d for i, d in enumerate(first) if i not in gone)]


def _unsqueeze(known: Known, node: ir.Node, first: Shape) -> Found:
    axes = known.axes(node)
    if axes is None:
        return None
    rank = len(first) + len(axes)
    new, rest = {a % rank for a in axes}, iter(first)
    return [tuple(1 if i in new else next(rest) for i in range(rank))]


def _pad(known: Known, node: ir.Node, first: Shape) -> Found:
    pads = known.content(node.inputs[1])
    axes = known.numbers(node.inputs[3]) if len(node.inputs) > 3 else list(range(len(first)))
    if pads is None or axes is None:
        return None
    dims, flat = list(first), pads.ravel()
    for i, axis in enumerate(axes):
        dims[axis] = tidy(dims[axis] + flat[i] + flat[i + len(axes)])
    return [tuple(dims)]


def _expand(known: Known, node: ir.Node, first: Shape) -> Found:
    target = known.content(node.inputs[1])
    return None if target is None else [broadcast([first, tuple(target.ravel())])]


def _tile(known: Known, node: ir.Node, first: Shape) -> Found:
    repeats = known.content(node.inputs[1])
    if repeats is None:
        return None
    return [tuple(tidy(d * r) for d, r in zip(first, repeats.ravel(), strict=True))]


def _window(known: Known, node: ir.Node, first: Shape) -> Found:
    """Convolutions and pools."""
    attributes = node.attributes
    weight = known.shape(node.inputs[1]) if node.op_type == "Conv" else None
    kernel = attributes.get_ints("kernel_shape") or (weight[2:] if weight is not None else None)
    if kernel is None or attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    rank = len(kernel)
    pads = attributes.get_ints("pads", (0,) * 2 * rank)
    strides = attributes.get_ints("strides", (1,) * rank)
    dilations = attributes.get_ints("dilations", (1,) * rank)
    ceil = attributes.get_int("ceil_mode", 0)
    spatial: list[Dim] = []
    for i, size in enumerate(first[2:]):
        span = size + pads[i] + pads[i + rank] - dilations[i] * (kernel[i] - 1) - 1
        if ceil:
            span = span + strides[i] - 1
        spatial.append(tidy(quotient(tidy(span), strides[i]) + 1))
    channels = first[1] if weight is None else weight[0]
    if weight is not None and not isinstance(first[1], int) and node.inputs[1] is not None:
        groups = attributes.get_int("group", 1)
        if isinstance(weight[1], int):
            known.ties.append(Tie(first[1], weight[1] * groups, node.inputs[1]))
    return [(first[0], channels, *spatial)]


def _resize(known: Known, node: ir.Node, first: Shape) -> Found:
    sizes = known.content(node.inputs[3]) if len(node.inputs) > 3 else None
    if sizes is not None and len(sizes) == len(first):
        return [tuple(sizes.ravel())]
    scales = known.content(node.inputs[2]) if len(node.inputs) > 2 else None
    if scales is None or len(scales) != len(first):
        return None
    dims: list[Dim] = []
    for size, scale in zip(first, scales.ravel(), strict=True):
        if isinstance(size, int):
            dims.append(math.floor(size * scale))
        elif float(scale).is_integer():
            dims.append(tidy(size * int(scale)))
        else:
            return None
    return [tuple(dims)]


def _flatten(known: Known, node: ir.Node, first: Shape) -> Found:
    axis = node.attributes.get_int("axis", 1) % (len(first) + 1)
    return [(product_of(first[:axis]), product_of(first[axis:]))]


def _global_pool(known: Known, node: ir.Node, first: Shape) -> Found:
    return [(*first[:2], *(1,) * (len(first) - 2))]


SHAPES: dict[str, Callable[[Known, ir.Node, Shape], Found]] = {
    "MatMul": _matmul,
    "Linear": _linear,
    "Gemm": _gemm,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Concat": _join,
    "Gather": _pick,
    "Slice": _cut,
    "Split": _pieces,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Pad": _pad,
    "Expand": _expand,
    "Tile": _tile,
    "Conv": _window,
    "AveragePool": _window,
    "MaxPool": _window,
    "Resize": _resize,
    "Flatten": _flatten,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
}
"""Shapes of the outputs from the shape of the first input."""
