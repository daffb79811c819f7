"""Ops as runtimes take them that have units of codes alone: by few ops of the standard.

Split, Squeeze, Unsqueeze and a Gather of one index become Slice and Reshape: HTP's provider (2.7.0)
gives wrong numbers for two Splits whose parts change places (a window shift of Swin's: −2.8 dB),
and takes some Squeezes and Gathers for floats (measured). All shapes are known here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ptq_onnx.graph.expansions import expand
from ptq_onnx.graph.formula import DOMAIN, constant, new_constant, sizes, unique_name

SPELLED = ("QuickGelu", "Silu")
"""Activation functions that the runtime computes by several ops."""


def spell(model: ir.Model) -> None:
    """Change those ops in place; what has no fixed shape stays."""
    graph = model.graph
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == "L2Normalization":
            expand(graph, node, [ir.node("LpNormalization", node.inputs[:1], {"axis": -1, "p": 2})])
        elif node.domain == DOMAIN and node.op_type in SPELLED:
            expand(graph, node)
        elif node.op_type == "Split":
            _split(graph, node)
        elif node.op_type in ("Squeeze", "Unsqueeze", "Flatten"):
            shape = fixed_sizes(node.outputs[0])
            if shape is not None:
                expand(graph, node, [_reshape(graph, node.inputs[0], shape)])
        elif node.op_type == "Gather":
            _gather(graph, node)


def fixed_sizes(value: ir.Value | None) -> list[int] | None:
    """A fixed shape; None where it is not."""
    found = sizes(value)
    dims = [d for d in found or () if isinstance(d, int)]
    return dims if found is not None and len(dims) == len(found) else None


def _split(graph: ir.Graph, node: ir.Node) -> None:
    """A Slice for every part."""
    data, parts = node.inputs[0], [fixed_sizes(v) for v in node.outputs]
    shape, axis = fixed_sizes(data), node.attributes.get_int("axis", 0)
    if data is None or shape is None or None in parts:
        return
    start = 0
    for value, part in zip(list(node.outputs), parts, strict=True):
        assert part is not None
        made = _slice(graph, data, axis % len(shape), start, start + part[axis])
        start += part[axis]
        output, name = made.outputs[0], str(value.name)
        output.shape, output.type = value.shape, value.type
        graph.insert_before(node, made)
        value.replace_all_uses_with(output, replace_graph_outputs=True)
        value.name = unique_name(graph, f"{name}_split")
        output.name = name
    graph.remove(node, safe=True)


def _gather(graph: ir.Graph, node: ir.Node) -> None:
    """One index of an axis as a Slice and a Reshape."""
    data, index = node.inputs[0], constant(node.inputs[1])
    shape, result = fixed_sizes(data), fixed_sizes(node.outputs[0])
    if data is None or index is None or index.size != 1 or shape is None or result is None:
        return
    axis = node.attributes.get_int("axis", 0) % len(shape)
    number = int(index.item()) % shape[axis]
    part = _slice(graph, data, axis, number, number + 1)
    output = part.outputs[0]
    output.name = unique_name(graph, f"{node.outputs[0].name}_slice")
    output.type = node.outputs[0].type
    output.shape = ir.Shape([*shape[:axis], 1, *shape[axis + 1 :]])
    expand(graph, node, [part, _reshape(graph, output, result)])


def _slice(graph: ir.Graph, data: ir.Value, axis: int, start: int, end: int) -> ir.Node:
    numbers = {"start": start, "end": end, "axis": axis}
    inputs = [
        new_constant(graph, f"{data.name}_{name}", np.array([number], np.int64))
        for name, number in numbers.items()
    ]
    return ir.node("Slice", [data, *inputs], name=unique_name(graph, f"{data.name}_slice_{start}"))


def _reshape(graph: ir.Graph, data: ir.Value | None, shape: Sequence[int]) -> ir.Node:
    assert data is not None
    target = new_constant(graph, f"{data.name}_shape", np.array(shape, np.int64))
    return ir.node("Reshape", [data, target], name=unique_name(graph, f"{data.name}_reshape"))
