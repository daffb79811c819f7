"""Products with a stack of constant weights [E, K, N] (experts), as one linear for each.

A stack has one scale per tensor in a quantized file, a linear one per output channel; and only of
linears are the inputs' ranges, the rounding and the biases looked after. The inputs are split
along the axis of the experts, the results joined along it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import name_of
from ptq_onnx.equalization.writer import Writer, take_over
from ptq_onnx.graph.formula import constant, is_private, new_constant

MOST = 64
"""Experts of one product; a graph of more would have too many nodes."""


def experts_as_linears(model: ir.Model) -> int:
    """Write products with stacked weights as linears; returns how many products."""
    return sum(_split(model.graph, node) for node in list(model.graph))


def left_in_float(model: ir.Model) -> Iterator[tuple[ir.Value, ir.Node, str]]:
    """Constants of products that no linear took, each with its product and why it has no codes."""
    for node in model.graph:
        if node.op_type not in ("MatMul", "Einsum"):
            continue
        for value in node.inputs:
            weight = constant(value)
            if (
                value is None
                or weight is None
                or weight.ndim < (3 if node.op_type == "MatMul" else 2)
                or not np.issubdtype(weight.dtype, np.floating)
            ):
                continue
            stack = " x ".join(str(d) for d in weight.shape)
            yield (
                value,
                node,
                (
                    f"stays float: the weights [{stack}] of {node.op_type} '{name_of(node)}' are"
                    f" not a stack of at most {MOST} matrices that could be linears"
                ),
            )


def _split(graph: ir.Graph, product: ir.Node) -> bool:
    if product.op_type != "MatMul" or product.domain or None in product.inputs:
        return False
    data, stack = product.inputs
    weight, output = constant(stack), product.outputs[0]
    if weight is None or data is None or stack is None or weight.ndim < 3:
        return False
    experts = weight.shape[-3]
    if math.prod(weight.shape[:-2]) != experts or experts > MOST:
        return False
    if data.shape is None or output.shape is None or constant(data) is not None:
        return False
    shape, wide = list(data.shape), list(output.shape)
    if len(shape) < 3 or len(shape) != len(wide) or shape[-3] not in (1, experts):
        return False
    write, like = Writer(graph, product), output
    bias, output = _bias_behind(output, experts, weight.shape[-1])
    axis = new_constant(graph, f"{stack.name}_axis", np.array([-3], np.int64))
    parts = [data] * experts
    flat = [*shape[:-3], *shape[-2:]]
    if shape[-3] == experts and experts > 1:
        sizes = new_constant(graph, f"{stack.name}_split", np.ones(experts, np.int64))
        one = [*shape[:-3], 1, *shape[-2:]]
        place = len(shape) - 3
        parts = write.nodes("Split", [data, sizes], one, like, "part", experts, axis=place)
    read = [
        write.node("Squeeze", [part, axis], flat, like, "expert") for part in dict.fromkeys(parts)
    ]
    read = read if len(read) == experts else read * experts
    results = []
    matrices = weight.reshape(experts, *weight.shape[-2:])
    for number, (value, matrix) in enumerate(zip(read, matrices, strict=True)):
        inputs = [value, new_constant(graph, f"{stack.name}_{number}", matrix.copy())]
        if bias is not None:
            inputs.append(new_constant(graph, f"{stack.name}_bias_{number}", bias[number]))
        columns = [*flat[:-1], weight.shape[-1]]
        made = write.node("Linear", inputs, columns, like, "linear", domain="ptq_onnx")
        joined = [*flat[:-2], 1, flat[-2], weight.shape[-1]]
        results.append(write.node("Unsqueeze", [made, axis], joined, like, "joined"))
    whole = results[0]
    if len(results) > 1:
        whole = write.node("Concat", results, wide, like, "experts", axis=-3)
    whole.shape, whole.type = ir.Shape(wide), output.type
    name = output.name
    take_over(graph, output, whole)
    whole.name = name
    return True


def _bias_behind(
    output: ir.Value, experts: int, width: int
) -> tuple[NDArray[np.generic] | None, ir.Value]:
    """The constant [E, 1, N] that is added behind, and what that makes."""
    node = next(iter(output.uses())).node if is_private(output) else None
    if node is not None and node.op_type == "Add":
        other = next((v for v in node.inputs if v is not output), None)
        found = constant(other)
        if (
            found is not None
            and found.ndim <= len(output.shape or ())  # it adds no axis
            and found.shape[-3:] == (experts, 1, width)
            and found.size == experts * width
        ):
            return found.reshape(experts, width), node.outputs[0]
    return None, output
