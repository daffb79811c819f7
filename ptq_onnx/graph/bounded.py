"""Activations with an upper bound, min(f(x), bound).

The bound is an attribute of the node while the model is in memory. In a file it is a Min behind the
node, or nothing where the codes of the output end there.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ptq_onnx.graph.formula import new_constant, unique_name

BOUND = "ptq_onnx_bound"


def bound_of(node: ir.Node) -> float | None:
    """The bound; None where the node has none."""
    return node.attributes.get_float(BOUND) if BOUND in node.attributes else None


def set_bound(node: ir.Node, bound: float) -> None:
    """Bound the node's output."""
    node.attributes[BOUND] = ir.AttrFloat32(BOUND, bound)


def release(node: ir.Node) -> None:
    """Take the bound away."""
    node.attributes.pop(BOUND, None)


def write_bound(graph: ir.Graph, node: ir.Node) -> None:
    """A Min behind the node instead of its bound; its readers and the graph's output get it."""
    bound = bound_of(node)
    if bound is None:
        return
    release(node)
    made = node.outputs[0]
    name = str(made.name)
    number = np.array(bound, (made.dtype or ir.DataType.FLOAT).numpy())
    limit = new_constant(graph, unique_name(graph, f"{name}_bound"), number)
    least = ir.node("Min", [made, limit], name=f"{node.name}_bounded")
    output = least.outputs[0]
    output.type, output.shape = made.type, made.shape
    least.metadata_props.update(node.metadata_props)
    readers = [(use.node, use.idx) for use in made.uses() if use.node is not least]
    for reader, index in readers:
        reader.replace_input_with(index, output)
    for index, value in enumerate(graph.outputs):
        if value is made:
            graph.outputs[index] = output
    graph.insert_after(node, least)
    made.name = unique_name(graph, f"{name}_unbounded")
    output.name = name
