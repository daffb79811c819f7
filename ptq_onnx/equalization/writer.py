"""Nodes put into a float graph, named after what they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.walking import is_constant
from ptq_onnx.graph.formula import new_constant, unique_name


class Writer:
    """Puts new nodes in front of an old one; they take over its metadata."""

    def __init__(self, graph: ir.Graph, anchor: ir.Node) -> None:
        self.graph, self.anchor = graph, anchor

    def node(
        self,
        op: str,
        inputs: list[ir.Value],
        shape: Sequence[int | ir.SymbolicDim],
        like: ir.Value,
        suffix: str,
        domain: str = "",
        **attributes: int | tuple[int, ...],
    ) -> ir.Value:
        """One node; returns its output, of the type of ``like``."""
        return self.nodes(op, inputs, shape, like, suffix, 1, domain, **attributes)[0]

    def nodes(
        self,
        op: str,
        inputs: list[ir.Value],
        shape: Sequence[int | ir.SymbolicDim],
        like: ir.Value,
        suffix: str,
        count: int,
        domain: str = "",
        **attributes: int | tuple[int, ...],
    ) -> list[ir.Value]:
        """One node with ``count`` outputs of the same shape."""
        name = unique_name(self.graph, f"{like.name}_{suffix}")
        made = ir.node(op, inputs, attributes, domain=domain, num_outputs=count)
        made.name = f"{name}_node"
        for number, output in enumerate(made.outputs):
            output.name = name if count == 1 else unique_name(self.graph, f"{name}_{number}")
            output.type, output.shape = like.type, ir.Shape(shape)
        made.metadata_props.update(self.anchor.metadata_props)
        self.graph.insert_before(self.anchor, made)
        return list(made.outputs)

    def reshape(
        self,
        value: ir.Value,
        sizes: list[int],
        shape: Sequence[int | ir.SymbolicDim],
        suffix: str,
    ) -> ir.Value:
        """A Reshape of ``value`` to ``sizes``, whose output has the shape ``shape``."""
        target = new_constant(self.graph, f"{value.name}_{suffix}_shape", np.array(sizes, np.int64))
        return self.node("Reshape", [value, target], list(shape), value, suffix)


def take_over(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let the readers of ``old`` read ``new``, and drop what nobody reads any more."""
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    node = old.producer()
    while node is not None and not any(v.uses() or v.is_graph_output() for v in node.outputs):
        before = next((v for v in node.inputs if v is not None and not is_constant(v)), None)
        graph.remove(node, safe=True)
        node = None if before is None else before.producer()


def describe_node(value: ir.Value, like: ir.Node) -> None:
    """Give the node that makes ``value`` the name of the one that it replaces, which is renamed."""
    node = value.producer()
    if node is not None:
        node.name = like.name or node.name
        like.name = f"{like.name}_replaced"


def drop_unread(graph: ir.Graph, start: ir.Node) -> None:
    """Remove a node and the layout ops behind it, none of which is read any more."""
    behind: list[ir.Node] = []
    pending = [start]
    while pending:
        node = pending.pop()
        if node not in behind:
            behind.append(node)
            pending.extend(use.node for v in node.outputs for use in v.uses())
    order = {node: i for i, node in enumerate(graph)}
    for node in sorted(behind, key=lambda n: -order[n]):
        graph.remove(node, safe=True)
