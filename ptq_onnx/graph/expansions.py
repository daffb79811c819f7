"""Standard ONNX for the fused ops of ours: each op has one expansion."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ptq_onnx.graph.bounded import write_bound
from ptq_onnx.graph.formula import DOMAIN, names_in, new_constant, unique_name

Names = set[str] | None
"""Those of all values of a graph, where they are known."""

QUICK_GELU_FACTOR = 1.702


def to_standard(model: ir.Model) -> ir.Model:
    """A copy of the model in standard ONNX; weights are shared, the original is untouched."""
    return standardise(model.clone())


def standardise(model: ir.Model) -> ir.Model:
    """The model itself in standard ONNX, changed in place."""
    graph = model.graph
    for node in list(graph):
        write_bound(graph, node)
    ours = [node for node in graph if node.domain == DOMAIN]
    taken = names_in(graph) if ours else None
    for node in ours:
        expand(graph, node, taken=taken)
    graph.opset_imports.pop(DOMAIN, None)
    return model


def _linear(graph: ir.Graph, node: ir.Node, taken: Names) -> list[ir.Node]:
    """MatMul, and Add where there is a bias."""
    output, inputs = node.outputs[0], node.inputs
    if len(inputs) == 2:
        return [ir.node("MatMul", list(inputs), name=node.name)]
    product = ir.node("MatMul", list(inputs[:2]), name=f"{node.name}_matmul")
    _describe(product.outputs[0], unique_name(graph, f"{output.name}_matmul", taken), output)
    return [product, ir.node("Add", [product.outputs[0], inputs[2]], name=node.name)]


def _quick_gelu(graph: ir.Graph, node: ir.Node, taken: Names) -> list[ir.Node]:
    """x · sigmoid(1.702 x)"""
    output, x = node.outputs[0], node.inputs[0]
    number = np.array(QUICK_GELU_FACTOR, (output.dtype or ir.DataType.FLOAT).numpy())
    factor = new_constant(graph, f"{output.name}_factor", number, taken)
    scaled = ir.node("Mul", [x, factor], name=f"{node.name}_scaled")
    _describe(scaled.outputs[0], unique_name(graph, f"{output.name}_scaled", taken), output)
    sigmoid = ir.node("Sigmoid", [scaled.outputs[0]], name=f"{node.name}_sigmoid")
    _describe(sigmoid.outputs[0], unique_name(graph, f"{output.name}_sigmoid", taken), output)
    return [scaled, sigmoid, ir.node("Mul", [x, sigmoid.outputs[0]], name=node.name)]


def _silu(graph: ir.Graph, node: ir.Node, taken: Names) -> list[ir.Node]:
    """x · sigmoid(x)"""
    output, x = node.outputs[0], node.inputs[0]
    sigmoid = ir.node("Sigmoid", [x], name=f"{node.name}_sigmoid")
    _describe(sigmoid.outputs[0], unique_name(graph, f"{output.name}_sigmoid", taken), output)
    return [sigmoid, ir.node("Mul", [x, sigmoid.outputs[0]], name=node.name)]


def _rms_norm(graph: ir.Graph, node: ir.Node, taken: Names) -> list[ir.Node]:
    """x / √(mean x² + ε) · γ"""
    output, (x, gamma) = node.outputs[0], node.inputs
    axes = new_constant(graph, f"{output.name}_axes", np.array([-1], np.int64), taken)
    number = np.array(node.attributes.get_float("epsilon", 0.0), np.float32)
    epsilon = new_constant(graph, f"{output.name}_epsilon", number, taken)
    square = ir.node("Mul", [x, x], name=f"{node.name}_square")
    mean = ir.node("ReduceMean", [square.outputs[0], axes], name=f"{node.name}_mean")
    shifted = ir.node("Add", [mean.outputs[0], epsilon], name=f"{node.name}_shifted")
    root = ir.node("Sqrt", [shifted.outputs[0]], name=f"{node.name}_root")
    quotient = ir.node("Div", [x, root.outputs[0]], name=f"{node.name}_quotient")
    row = _one_column(output)
    for part, suffix, like in (
        (square, "square", output),
        (mean, "mean", row),
        (shifted, "shifted", row),
        (root, "root", row),
        (quotient, "quotient", output),
    ):
        _describe(part.outputs[0], unique_name(graph, f"{output.name}_{suffix}", taken), like)
    scaled = ir.node("Mul", [quotient.outputs[0], gamma], name=node.name)
    return [square, mean, shifted, root, quotient, scaled]


def _l2_norm(graph: ir.Graph, node: ir.Node, taken: Names) -> list[ir.Node]:
    """x / max(|x|, ε)"""
    output, x = node.outputs[0], node.inputs[0]
    axes = new_constant(graph, f"{output.name}_axes", np.array([-1], np.int64), taken)
    number = np.array(node.attributes.get_float("epsilon", 0.0), np.float32)
    epsilon = new_constant(graph, f"{output.name}_epsilon", number, taken)
    norm = ir.node("ReduceL2", [x, axes], name=f"{node.name}_norm")
    held = ir.node("Clip", [norm.outputs[0], epsilon], name=f"{node.name}_held")
    row = _one_column(output)
    for part, suffix in ((norm, "norm"), (held, "held")):
        _describe(part.outputs[0], unique_name(graph, f"{output.name}_{suffix}", taken), row)
    return [norm, held, ir.node("Div", [x, held.outputs[0]], name=node.name)]


EXPANSIONS: dict[str, Callable[[ir.Graph, ir.Node, Names], list[ir.Node]]] = {
    "Linear": _linear,
    "QuickGelu": _quick_gelu,
    "Silu": _silu,
    "RMSNormalization": _rms_norm,
    "L2Normalization": _l2_norm,
}


def _one_column(like: ir.Value) -> ir.Value:
    """Type and shape of a reduction over the last axis."""
    shape = None if like.shape is None else ir.Shape([*list(like.shape)[:-1], 1])
    return ir.Value(type=like.type, shape=shape)


def _describe(value: ir.Value, name: str, like: ir.Value) -> None:
    value.name, value.type, value.shape = name, like.type, like.shape


def expand(
    graph: ir.Graph, node: ir.Node, new: list[ir.Node] | None = None, taken: Names = None
) -> None:
    """Put the new nodes, by default those of its expansion, in the place of one; the last has its
    output, all have its metadata. ``taken``: see :func:`unique_name`."""
    new = new or EXPANSIONS[node.op_type](graph, node, taken)
    old, output = node.outputs[0], new[-1].outputs[0]
    _describe(output, str(old.name), old)
    for item in new:
        item.metadata_props.update(node.metadata_props)
    graph.insert_before(node, new)
    old.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(node, safe=True)
