"""Nodes by what they do, and ways through a graph that leave layout ops aside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import onnx_ir as ir

LAYOUT_OPS = frozenset(
    [
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Split",
        "Gather",
        "Flatten",
        "Expand",
        "Identity",
        "Concat",
        "Tile",
        "Pad",
        "Shape",
        "Cast",
        "DepthToSpace",
        "SpaceToDepth",
    ]
)
"""Ops that move elements and compute nothing."""


ACTIVATIONS = frozenset((
    "Gelu", "QuickGelu", "Silu", "Relu", "Sigmoid", "Tanh", "Erf", "HardSwish", "Swish", "Mish",
    "LeakyRelu", "Elu", "PRelu", "Clip", "HardSigmoid", "Softplus",
))  # fmt: skip
"""Ops that may stand between fc1 and fc2."""


NORMS = frozenset((
    "LayerNormalization", "RMSNormalization", "L2Normalization", "BatchNormalization",
    "GroupNormalization", "InstanceNormalization",
))  # fmt: skip


POOLS = frozenset(
    ["ReduceMean", "GlobalAveragePool", "AveragePool", "MaxPool", "GlobalMaxPool", "ReduceMax"]
)


ARITHMETIC = frozenset(["Add", "Sub", "Mul", "Div", "Neg"])


REACH = 12
"""How many compute ops a walk passes at most."""


def name_of(node: ir.Node) -> str:
    """The node's name; the name of its first output where it has none."""
    return node.name or node.outputs[0].name or ""


def is_layout(node: ir.Node) -> bool:
    """True for ops that only move elements."""
    return node.op_type in LAYOUT_OPS


def keeps_range(node: ir.Node) -> bool:
    """True for ops whose numbers lie between those that they read: layout ops, a MaxPool, a Resize
    that is no cubic one."""
    if node.op_type == "Resize":
        return node.attributes.get_string("mode", "nearest") != "cubic"
    return is_layout(node) or node.op_type == "MaxPool"


def is_constant(value: ir.Value | None) -> bool:
    """True for an initializer or the output of a Constant node."""
    if value is None:
        return True
    producer = value.producer()
    if producer is not None:
        return producer.op_type == "Constant"
    return value.const_value is not None


def is_linear(node: ir.Node) -> bool:
    """True for the fused linear op (x W + b)."""
    return node.op_type == "Linear" and node.domain == "ptq_onnx"


def is_projection(node: ir.Node) -> bool:
    """True for a linear, or a convolution of one pixel that mixes all channels."""
    return is_linear(node) or (kernel_size(node) == 1 and node.attributes.get_int("group", 1) == 1)


def is_depthwise(node: ir.Node) -> bool:
    """True for a convolution with more than one group."""
    return kernel_size(node) is not None and node.attributes.get_int("group", 1) > 1


def kernel_size(node: ir.Node) -> int | None:
    """Pixels of a convolution's constant kernel; None for any other node."""
    weight = node.inputs[1] if node.op_type == "Conv" else None
    if weight is None or not is_constant(weight) or weight.shape is None:
        return None
    return math.prod(int(d) for d in list(weight.shape)[2:] if isinstance(d, int))


def consumers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Nodes that read the value, with the input index, in graph order."""
    yield from ((use.node, use.idx) for use in value.uses())


def through_layout(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The compute nodes that a value reaches through layout ops, with the input index."""
    seen: set[tuple[ir.Node, int]] = set()
    for node, index in consumers(value):
        found: Iterable[tuple[ir.Node, int]]
        if is_layout(node):
            # Only the data input of a layout op carries the value on; others hold shapes.
            if index > 0 and node.op_type != "Concat":
                continue
            found = (pair for output in node.outputs for pair in through_layout(output))
        else:
            found = ((node, index),)
        for pair in found:
            if pair not in seen:
                seen.add(pair)
                yield pair


def source(value: ir.Value) -> ir.Node | None:
    """The compute node behind a value, looking back through layout ops (data input)."""
    node = value.producer()
    while node is not None and is_layout(node):
        data = next((v for v in node.inputs if not is_constant(v)), None)
        node = None if data is None else data.producer()
    return node


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs that are activations; of a layout op, the one whose elements it moves."""
    found = [v for v in node.inputs if v is not None and not is_constant(v)]
    return found if not is_layout(node) or node.op_type == "Concat" else found[:1]


def back_to(
    value: ir.Value,
    wanted: Callable[[ir.Node], bool],
    passing: Callable[[ir.Node], bool] | None = None,
    reach: int = REACH,
) -> list[ir.Node]:
    """The way back from ``value`` to the nearest node that is wanted, that node first.

    Empty where there is none behind layout ops and what may be passed (by default arithmetic
    and norms). Of several ways the shortest is taken.
    """
    may_pass = passing or (lambda n: n.op_type in ARITHMETIC or n.op_type in NORMS)
    ways: list[tuple[ir.Value, list[ir.Node]]] = [(value, [])]
    seen: set[ir.Node] = set()
    while ways:
        at, passed = ways.pop(0)
        node = at.producer()
        if node is None or node in seen or len(passed) > reach:
            continue
        if is_layout(node):
            ways[:0] = [(v, passed) for v in data_inputs(node)]
            continue
        seen.add(node)
        if wanted(node):
            return [node, *reversed(passed)]
        if may_pass(node):
            ways += [(v, [*passed, node]) for v in data_inputs(node)]
    return []


def ahead_to(
    value: ir.Value,
    wanted: Callable[[ir.Node, int], bool],
    passing: Callable[[ir.Node], bool],
    reach: int = 4,
) -> list[ir.Node]:
    """The way on from ``value`` to the nearest node that is wanted, that node last.

    Empty where there is none behind layout ops and what may be passed.
    """
    ways: list[tuple[ir.Value, list[ir.Node]]] = [(value, [])]
    seen: set[ir.Node] = set()
    while ways:
        at, passed = ways.pop(0)
        for node, index in through_layout(at):
            if wanted(node, index):
                return [*passed, node]
            if node not in seen and passing(node) and len(passed) < reach and node.outputs:
                seen.add(node)
                ways.append((node.outputs[0], [*passed, node]))
    return []


def behind(value: ir.Value, stop: Callable[[ir.Node], bool], limit: int = 24) -> list[ir.Node]:
    """All compute nodes behind ``value`` up to those that stop it; empty beyond ``limit``."""
    found: list[ir.Node] = []
    open_values, seen = [value], set[ir.Node]()
    while open_values:
        node = open_values.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if is_layout(node):
            open_values += data_inputs(node)
        elif not stop(node):
            found.append(node)
            if len(found) > limit:
                return []
            open_values += data_inputs(node)
    return found


def is_product(node: ir.Node) -> bool:
    """True for a product of two activations."""
    return node.op_type == "MatMul" and not any(is_constant(v) for v in node.inputs)


def is_row_factors(node: ir.Node) -> bool:
    """True for a Mul by constants [1, T, 1], powers of two of which the largest is one: factors of
    the rows of [B, T, D] (``equalization/token_factors.py``)."""
    if node.op_type != "Mul":
        return False
    for value in node.inputs:
        shape = None if value is None or value.shape is None else list(value.shape)
        if value is None or shape is None or len(shape) != 3 or (shape[0], shape[2]) != (1, 1):
            continue
        if is_constant(value) and value.const_value is not None and shape[1] != 1:
            mantissa, _ = np.frexp(value.const_value.numpy())
            return bool(np.all(mantissa == 0.5)) and float(value.const_value.numpy().max()) == 1
    return False
