"""The normalisation of the image, where the graph holds it: found, and folded into a convolution.

``(x - mean) / std`` stands in front of the first convolution in files that take pixels as they
are. There it is arithmetic with one number per channel, which the convolution's weight can hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.graph.formula import constant, new_constant

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)

ARITHMETIC = ("Add", "Sub", "Mul", "Div")

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """What the graph makes of the image first: factor · x + shift per channel, at ``end``, whose
    axes are those of the image in ``order``."""

    factor: Vector
    shift: Vector
    end: ir.Value
    order: tuple[int, ...]
    nodes: tuple[ir.Node, ...]


def affine(image: ir.Value) -> Affine:
    """Follow the image through Cast, Transpose and arithmetic with a number per channel."""
    factor, shift, value = np.ones(1), np.zeros(1), image
    order = [0, 1, 2, 3]
    nodes: list[ir.Node] = []
    while True:
        uses = [use for use in value.uses() if use.node.op_type not in ("Shape", "Size")]
        if len(uses) != 1 or value.is_graph_output():
            break
        node, index = uses[0].node, uses[0].idx
        if node.op_type == "Transpose":
            perm = node.attributes.get_ints("perm")
            if perm is None or len(perm) != 4:
                break
            order = [order[i] for i in perm]
        elif node.op_type in ARITHMETIC:
            number = _per_channel(constant(node.inputs[1 - index]), order.index(1))
            if number is None or (node.op_type == "Div" and index == 1):
                break
            if node.op_type == "Mul":
                factor, shift = factor * number, shift * number
            elif node.op_type == "Div":
                factor, shift = factor / number, shift / number
            elif node.op_type == "Add":
                shift = shift + number
            elif index == 0:
                shift = shift - number
            else:
                factor, shift = -factor, number - shift
        elif node.op_type == "Cast":
            if node.attributes.get_int("to", 0) not in FLOATS:
                break
        elif node.op_type != "Identity":
            break
        nodes.append(node)
        value = node.outputs[0]
    return Affine(factor, shift, value, tuple(order), tuple(nodes))


def _per_channel(array: NDArray[Any] | None, axis: int) -> Vector | None:
    """A constant as one number, or one for each channel of a 4-D image; None for others."""
    if array is None or array.ndim > 4 or not np.isfinite(array.astype(np.float64)).all():
        return None
    shape = (1,) * (4 - array.ndim) + array.shape
    if any(size != 1 for i, size in enumerate(shape) if i != axis):
        return None
    return array.astype(np.float64).reshape(-1)


def normalised_from(image: ir.Value) -> int | None:
    """255 where the graph brings pixels of 0 to 255 to about -3 to 3 (or 0 to 1) itself, 1 where
    it does so with 0 to 1; None where it does neither."""
    found = affine(image)
    factor, shift = np.broadcast_arrays(found.factor, found.shift)
    if not (factor > 0).all():
        return None
    mean = -shift / factor
    if (factor <= 0.2).all() and (mean > -1).all() and (mean < 255).all():
        return 255
    if (factor == 1).all():  # a mean taken off, and nothing else
        return 255 if (mean > 20).all() and (mean < 255).all() else None
    if (factor > 1).all() and (factor < 20).all() and (mean > 0.05).all() and (mean < 0.95).all():
        return 1
    return None


def fold_normalisation(model: ir.Model) -> int:
    """Fold the first arithmetic on the images into the convolution that reads them, in place:
    W·(a·x + b) = (W·a)·x + Σ W·b. Where it pads with zeros, b must be zero. Returns how many."""
    images = [v for v in model.graph.inputs if not v.is_initializer()]
    return sum(_fold(model.graph, image) for image in images)


def _fold(graph: ir.Graph, image: ir.Value) -> bool:
    found = affine(image)
    uses = list(found.end.uses())
    if found.order != (0, 1, 2, 3) or len(uses) != 1 or found.end.is_graph_output():
        return False
    if not any(node.op_type in ARITHMETIC for node in found.nodes):
        return False
    if any(len(node.outputs[0].uses()) != 1 for node in found.nodes):
        return False  # a Shape of what would go
    conv = uses[0].node
    read = [constant(v) for v in conv.inputs[1:]]
    if conv.op_type != "Conv" or uses[0].idx != 0 or any(a is None for a in read):
        return False
    weight = np.asarray(read[0])
    padded = any(conv.attributes.get_ints("pads", ()))
    padded |= conv.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    groups = conv.attributes.get_int("group", 1)
    channels = weight.shape[1] * groups
    if weight.dtype != np.float32 or (padded and found.shift.any()):
        return False
    if any(len(v) not in (1, channels) for v in (found.factor, found.shift)):
        return False
    if image.shape is None or image.shape[1] != channels:
        return False  # a grey image that the arithmetic spreads over several channels
    spread = (groups, 1, weight.shape[1], *(1,) * (weight.ndim - 2))
    factor, shift = (np.broadcast_to(v, channels) for v in (found.factor, found.shift))
    wide = weight.astype(np.float64).reshape(groups, -1, *weight.shape[1:])
    bias = np.asarray(read[1] if len(read) > 1 else np.zeros(len(weight)), np.float64)
    bias = bias + (wide * shift.reshape(spread)).reshape(len(weight), -1).sum(axis=1)
    folded = (wide * factor.reshape(spread)).reshape(weight.shape)
    name = f"{conv.name or conv.outputs[0].name}_of_pixels"
    inputs = [
        image,
        new_constant(graph, f"{name}_weight", folded.astype(np.float32)),
        new_constant(graph, f"{name}_bias", bias.astype(np.float32)),
    ]
    new = ir.node("Conv", inputs, dict(conv.attributes), name=conv.name)
    output, before = new.outputs[0], conv.outputs[0]
    output.name, output.type, output.shape = before.name, before.type, before.shape
    new.metadata_props.update(conv.metadata_props)
    graph.insert_before(conv, new)
    before.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove([conv, *reversed(found.nodes)], safe=True)
    return True
