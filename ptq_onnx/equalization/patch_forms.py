"""Convolutions as linears, and with their padding apart: products that integer kernels take."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.element_map import layout_indices
from ptq_onnx.blocks.walking import consumers, is_layout, is_product, through_layout
from ptq_onnx.equalization.writer import Writer, describe_node, take_over
from ptq_onnx.fusion.patch_embed import is_patch_embed
from ptq_onnx.graph.formula import constant, new_constant


def patches_as_linear(model: ir.Model) -> int:
    """Write convolutions whose kernel is their stride as products; returns how many."""
    return sum(_patches_as_linear(model.graph, node) for node in list(model.graph))


def _patches_as_linear(graph: ir.Graph, conv: ir.Node) -> bool:
    image = conv.inputs[0]
    weight = constant(conv.inputs[1]) if conv.op_type == "Conv" else None
    if weight is None or image is None or not is_patch_embed(conv) or weight.ndim != 4:
        return False
    tokens = _tokens(conv.outputs[0])
    sides = [] if image.shape is None else list(image.shape)[1:]
    if tokens is None or not all(isinstance(d, int) for d in sides):
        return False
    outputs, channels, kernel_h, kernel_w = weight.shape
    height, width = (d if isinstance(d, int) else 0 for d in sides[1:])
    rows, columns = height // kernel_h, width // kernel_w
    if (rows * kernel_h, columns * kernel_w) != (height, width) or not height * width:
        return False
    assert image.shape is not None
    batch = image.shape[0]
    write = Writer(graph, conv)
    split = [channels, rows, kernel_h, columns, kernel_w]
    grid = write.reshape(image, [0, *split], [batch, *split], "grid")
    order = (0, 2, 4, 1, 3, 5)
    moved = [batch, *([channels, rows, kernel_h, columns, kernel_w][a - 1] for a in order[1:])]
    turned = write.node("Transpose", [grid], list(moved), image, "turned", perm=order)
    flat = [rows * columns, channels * kernel_h * kernel_w]
    patches = write.reshape(turned, [0, *flat], [batch, *flat], "patches")
    matrix = np.ascontiguousarray(weight.reshape(outputs, -1).T)
    inputs = [patches, new_constant(graph, f"{conv.inputs[1].name}_matrix", matrix)]  # type: ignore[union-attr]
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        inputs.append(conv.inputs[2])
    shape = [batch, rows * columns, outputs]
    result = write.node("Linear", inputs, list(shape), tokens, "linear", "ptq_onnx")
    describe_node(result, conv)
    wanted = [] if tokens.shape is None else list(tokens.shape)
    if [str(d) for d in wanted[1:]] != [str(d) for d in shape[1:]]:
        sizes = [0, *(int(d) for d in wanted[1:] if isinstance(d, int))]
        result = write.reshape(result, sizes, wanted, "shaped")
    take_over(graph, tokens, result)
    return True


def packed_pixels_as_linear(model: ir.Model) -> int:
    """Write convolutions of one pixel that several products read parts of as linears; returns how
    many."""
    return sum(_packed_pixels_as_linear(model.graph, node) for node in list(model.graph))


def _packed_pixels_as_linear(graph: ir.Graph, conv: ir.Node) -> bool:
    image, output = conv.inputs[0], conv.outputs[0]
    weight = constant(conv.inputs[1]) if conv.op_type == "Conv" else None
    if weight is None or image is None or weight.shape[2:] != (1, 1) or not _is_pointwise(conv):
        return False
    leaves = list(through_layout(output))
    if len(leaves) < 2 or not all(is_product(node) for node, _ in leaves):
        return False
    if image.shape is None or output.shape is None or output.is_graph_output():
        return False
    write = Writer(graph, conv)
    batch, channels, height, width = image.shape
    sizes = [batch, height, width]
    turned = write.node("Transpose", [image], [*sizes, channels], image, "last", perm=(0, 2, 3, 1))
    matrix = np.ascontiguousarray(weight[:, :, 0, 0].T)
    inputs = [turned, new_constant(graph, f"{conv.inputs[1].name}_matrix", matrix)]  # type: ignore[union-attr]
    inputs += [bias for bias in conv.inputs[2:] if bias is not None]
    result = write.node("Linear", inputs, [*sizes, len(weight)], output, "linear", "ptq_onnx")
    describe_node(result, conv)
    order = [batch, len(weight), height, width]
    back = write.node("Transpose", [result], order, output, "first", perm=(0, 3, 1, 2))
    take_over(graph, output, back)
    return True


def _is_pointwise(conv: ir.Node) -> bool:
    """One group, step 1, nothing padded."""
    get = conv.attributes
    return (
        get.get_int("group", 1) == 1
        and set(get.get_ints("strides", (1,))) == {1}
        and not any(get.get_ints("pads", ()))
    )


def _tokens(value: ir.Value) -> ir.Value | None:
    """The first tensor behind a convolution's output that holds it with channels last.

    None unless a chain of layout ops without side branches leads there.
    """
    if value.shape is None or not all(isinstance(d, int) for d in list(value.shape)[1:]):
        return None
    sizes = [d for d in list(value.shape)[1:] if isinstance(d, int)]
    channels, size = sizes[0], math.prod(sizes)
    images = value.shape[0] if isinstance(value.shape[0], int) else 1
    expected = np.arange(images * size).reshape(images, channels, -1).transpose(0, 2, 1).ravel()
    current = value
    while True:
        uses = list(consumers(current))
        if len(uses) != 1 or current.is_graph_output() or not is_layout(uses[0][0]):
            return None
        node = uses[0][0]
        if node.op_type in ("Concat", "Shape") or len(node.outputs) != 1:
            return None
        current = node.outputs[0]
        found = layout_indices(value, current)
        if found is None or current.shape is None:
            return None
        last = current.shape[-1]
        if last == channels and np.array_equal(found.ravel(), expected):
            return current
