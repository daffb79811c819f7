"""A graph cut where its blocks begin and end."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ptq_onnx.blocks.role_map import Blocks
from ptq_onnx.blocks.walking import is_constant, name_of


@dataclass(frozen=True)
class Span:
    """Nodes that follow one another, with the tensors that come in and go out of them.

    ``blocks``: whose they are; empty for what stands before, between and behind blocks.
    """

    blocks: tuple[int, ...]
    nodes: tuple[ir.Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def label(self) -> str:
        """``blocks.3``, or of blocks that cannot be told apart ``blocks.3-5``."""
        first, last = self.blocks[0], self.blocks[-1]
        return f"blocks.{first}" if first == last else f"blocks.{first}-{last}"


def spans_of(graph: ir.Graph, blocks: Blocks) -> list[Span]:
    """The spans of a graph, in order; blocks whose nodes are mixed with each other are one."""
    nodes = list(graph)
    places: dict[int, tuple[int, int]] = {}
    for at, node in enumerate(nodes):
        role = blocks.roles.get(name_of(node))
        if role is not None and role.block is not None:
            first, _ = places.get(role.block, (at, at))
            places[role.block] = first, at
    merged: list[tuple[list[int], int, int]] = []
    for block, (first, last) in sorted(places.items(), key=lambda item: item[1]):
        if merged and first <= merged[-1][2]:
            members, start, end = merged[-1]
            merged[-1] = [*members, block], start, max(end, last)
        else:
            merged.append(([block], first, last))
    cuts: list[tuple[tuple[int, ...], int, int]] = []
    at = 0
    for members, first, last in merged:
        cuts += [((), at, first), (tuple(sorted(members)), first, last + 1)]
        at = last + 1
    cuts.append(((), at, len(nodes)))
    return [_span(graph, nodes[a:b], members) for members, a, b in cuts if b > a]


def _span(graph: ir.Graph, nodes: list[ir.Node], members: tuple[int, ...]) -> Span:
    own = set(nodes)
    read = (v for n in nodes for v in n.inputs if v is not None and not is_constant(v))
    inputs = dict.fromkeys(str(v.name) for v in read if v.producer() not in own)
    made = (v for n in nodes for v in n.outputs)
    outputs = [
        str(v.name)
        for v in made
        if v.is_graph_output() or any(node not in own for node, _ in v.uses())
    ]
    return Span(members, tuple(nodes), tuple(inputs), tuple(outputs))
