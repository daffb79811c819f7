"""Ops between convolutions on codes: which have integer kernels, and what stands around them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.walking import consumers, is_constant
from ptq_onnx.graph.formula import constant, is_private, scalar

KERNELS = frozenset((
    "Add", "Mul", "Sigmoid", "LeakyRelu", "GlobalAveragePool", "AveragePool", "MaxPool", "Concat",
    "Resize",
))  # fmt: skip
"""Ops beside products with an integer kernel: QLinearAdd and the like (measured, ONNX Runtime
1.31)."""
ON_CODES = KERNELS | {"HardSwish"}
"""Those, and what is written with them."""
SMOOTH = frozenset(("Silu", "Gelu", "QuickGelu", "HardSwish"))
"""Activation functions of floats between convolutions: in any layout, so that nothing is transposed
for them (an integer sigmoid takes longer than both conversions: measured)."""
MOVING = frozenset(("MaxPool", "Resize"))
"""Those whose codes are those that they read."""


def result_of(node: ir.Node) -> ir.Value:
    """What a node makes, behind an activation of its own that only clips."""
    value = node.outputs[0]
    while not value.is_graph_output():
        uses = list(consumers(value))
        if len(uses) != 1 or not only_clips(uses[0][0]):
            break
        value = uses[0][0].outputs[0]
    return value


def scales_hard_swish(node: ir.Node) -> bool:
    """True for a positive factor of a HardSwish, which its form on codes takes in."""
    before = None if node.inputs[0] is None else node.inputs[0].producer()
    if node.op_type != "Mul" or before is None or before.op_type != "HardSwish":
        return False
    return is_private(before.outputs[0]) and (scalar(node.inputs[1]) or 0.0) > 0


def only_clips(node: ir.Node) -> bool:
    """True for Relu, and for a Clip around or from 0: codes of that range hold no other numbers."""
    if node.op_type == "Relu":
        return True
    if node.op_type != "Clip" or len(node.inputs) < 3:
        return False
    low, high = scalar(node.inputs[1]), scalar(node.inputs[2])
    return low is not None and high is not None and low <= 0 < high


def clipped_to(value: ir.Value) -> tuple[float, float] | None:
    """The bounds of a tensor that Relu or a Clip makes; None for others."""
    node = value.producer()
    if node is None or not only_clips(node):
        return None
    if node.op_type == "Relu":
        return 0.0, np.inf
    return float(scalar(node.inputs[1]) or 0.0), float(scalar(node.inputs[2]) or 0.0)


def is_factor(node: ir.Node) -> bool:
    """True for a Mul by constants, one number or one per channel."""
    if node.op_type != "Mul" or is_constant(node.inputs[0]):
        return False
    return per_channel(node.inputs[1])


def next_to(factor: ir.Node) -> ir.Node | None:
    """The activation function in front of a factor, or else what alone reads its product."""
    read = factor.inputs[0]
    before = None if read is None else read.producer()
    if before is not None and before.op_type in SMOOTH:
        return before
    return reader_of(factor.outputs[0])


def reader_of(value: ir.Value) -> ir.Node | None:
    """What alone reads the value."""
    return next(consumers(value))[0] if is_private(value) else None


def is_made_by_convolution(value: ir.Value | None) -> bool:
    """True for what one alone makes for one reader, with constants that can be scaled."""
    node = None if value is None else value.producer()
    return (
        node is not None
        and value is not None
        and node.op_type == "Conv"
        and is_private(value)
        and all(map(is_constant, node.inputs[1:]))
    )


def is_one_pixel(value: ir.Value) -> bool:
    """True for one number per channel and image."""
    return value.shape is not None and list(value.shape)[2:] == [1, 1]


def per_channel(value: ir.Value | None) -> bool:
    """True for a float constant with one number, or one per channel, all of one sign."""
    held = constant(value)
    if held is None or held.dtype != np.float32:
        return False
    array = np.asarray(held, np.float32)
    sizes = (1,) * (4 - array.ndim) + array.shape
    alike = bool((array > 0).all() or (array < 0).all())
    alike = alike and bool(np.isfinite(array).all())
    return len(sizes) == 4 and sizes[0] == sizes[2] == sizes[3] == 1 and alike


def maker_of(value: ir.Value) -> ir.Node | None:
    """The op in front of activations that only clip."""
    node = value.producer()
    while node is not None and only_clips(node) and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node
