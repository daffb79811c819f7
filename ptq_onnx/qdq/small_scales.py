"""Weight scales too small for 16 bits, made larger by powers of two: the same numbers.

    y = x·W + b = (x·(W·f) + b·f) / f,  f = 2^k per output channel

Only the scales change, never the codes. f is 1 where a scale is large enough, so that the
product in front of the division stays about as large as those of its other channels.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import consumers
from ptq_onnx.graph.formula import constant, new_constant, unique_name

SMALLEST_NORMAL = 2.0**-14
"""Of 16 bits; below, a float has less than 11 bits of precision (IEEE 754, binary16)."""

LARGEST_FACTOR = 2.0**14
"""Its inverse is a normal number too."""


def power_of_two(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The smallest f = 2^k, k >= 0, with scale·f >= 2^-14; 1 where a scale is zero."""
    safe = np.where(scale > 0, scale.astype(np.float64), 1.0)
    return np.asarray(np.exp2(np.maximum(0, np.ceil(np.log2(SMALLEST_NORMAL / safe)))), np.float32)


def enlarge_small_scales(graph: ir.Graph) -> int:
    """Rewrite linears and convolutions whose weight has a smaller scale; how many there were.

    A scale that would need a factor beyond 2^14 stays as it is.
    """
    count = 0
    for node in list(graph):
        if node.op_type != "DequantizeLinear":
            continue
        codes, stored = constant(node.inputs[0]), constant(node.inputs[1])
        if stored is None or codes is None or stored.min() >= SMALLEST_NORMAL:
            continue
        readers = list(consumers(node.outputs[0]))
        if not readers or not all(
            _takes(node, codes.ndim, reader, index) for reader, index in readers
        ):
            continue
        scale = _any_for_zeros(node, codes, np.asarray(stored, np.float32))
        factor = power_of_two(scale)
        if factor.max() > LARGEST_FACTOR:
            continue
        name = f"{_name(node.inputs[1])}_enlarged"
        node.replace_input_with(1, new_constant(graph, name, scale * factor))
        if factor.max() == 1:
            continue
        for reader, _ in readers:
            _divide(graph, reader, factor)
            count += 1
    return count


def _any_for_zeros(
    node: ir.Node, codes: NDArray[np.generic], scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The scales, those of channels whose codes are all zero at least 2^-14: any will do."""
    axis = node.attributes.get_int("axis", 1) % codes.ndim
    others = tuple(k for k in range(codes.ndim) if k != axis) if scale.ndim else None
    unused = ~np.asarray(codes, np.float32).any(axis=others)
    return np.asarray(np.where(unused, np.maximum(scale, SMALLEST_NORMAL), scale), np.float32)


def _takes(dequantize: ir.Node, rank: int, reader: ir.Node, index: int) -> bool:
    """True for a product whose output channels are the axis of the scales of a weight of so many
    axes, its bias constant."""
    last = {"Conv": 0, "Linear": rank - 1, "MatMul": rank - 1}.get(reader.op_type)
    if index != 1 or last is None or (rank != 2 and reader.op_type != "Conv"):
        return False
    bias = reader.inputs[2] if len(reader.inputs) > 2 else None
    if bias is not None and constant(bias) is None:
        return False
    one_scale = constant(dequantize.inputs[1])
    axis = dequantize.attributes.get_int("axis", 1)
    return one_scale is not None and (one_scale.ndim == 0 or axis % rank == last)


def _divide(graph: ir.Graph, product: ir.Node, factor: NDArray[np.float32]) -> None:
    """Multiply the bias by the factor, and the output by its inverse."""
    bias = product.inputs[2] if len(product.inputs) > 2 else None
    array = constant(bias)
    if array is not None:
        enlarged = np.asarray(array, np.float32) * factor
        product.replace_input_with(2, new_constant(graph, f"{_name(bias)}_enlarged", enlarged))
    output, weight = product.outputs[0], product.inputs[1]
    rank = 0 if weight is None or weight.shape is None else len(weight.shape)
    shape = (-1, *[1] * (rank - 2)) if product.op_type == "Conv" and factor.ndim else factor.shape
    inverse = new_constant(graph, f"{output.name}_inverse", (1 / factor).reshape(shape))
    node = ir.node("Mul", [output, inverse], num_outputs=1)
    result = node.outputs[0]
    result.type, result.shape = output.type, output.shape
    for reader, index in [use for use in consumers(output) if use[0] is not node]:
        reader.replace_input_with(index, result)
    result.name = unique_name(graph, f"{output.name}_restored")
    node.name = f"{result.name}_node"
    graph.insert_after(product, node)
    for position, value in enumerate(graph.outputs):
        if value is output:
            result.name, output.name = output.name, result.name
            graph.outputs[position] = result


def _name(value: ir.Value | None) -> str:
    return "" if value is None else str(value.name)
