"""The order of the nodes in a file: ONNX demands makers before readers, some converters do not.

onnxruntime's float16 converter writes the Cast of the input last; runtimes sort for themselves.
"""

from __future__ import annotations

from collections import defaultdict
from heapq import heapify, heappop, heappush

import onnx


def sort_nodes(graph: onnx.GraphProto) -> bool:
    """Bring the nodes into an order in which each reads what is made, in place; True if it
    was another. Nodes keep their order where they can; a graph with a cycle is left as it is."""
    changed = False
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    changed |= sort_nodes(inner)
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    waits = [{makers[name] for name in _read(node) if name in makers} for node in graph.node]
    if all(max(before, default=-1) < i for i, before in enumerate(waits)):
        return changed
    readers: dict[int, list[int]] = defaultdict(list)
    for i, before in enumerate(waits):
        for maker in before:
            readers[maker].append(i)
    missing = [len(before) for before in waits]
    ready = [i for i, count in enumerate(missing) if count == 0]
    heapify(ready)
    order: list[int] = []
    while ready:
        first = heappop(ready)
        order.append(first)
        for reader in readers[first]:
            missing[reader] -= 1
            if missing[reader] == 0:
                heappush(ready, reader)
    if len(order) < len(graph.node):
        return changed
    nodes = [onnx.NodeProto.FromString(graph.node[i].SerializeToString()) for i in order]
    del graph.node[:]
    graph.node.extend(nodes)
    return True


def _read(node: onnx.NodeProto) -> set[str]:
    """The names that a node reads, those that its branches take from outside too."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            made = {v.name for v in (*graph.input, *graph.initializer)}
            made.update(name for inner in graph.node for name in inner.output)
            names.update(name for inner in graph.node for name in _read(inner) if name not in made)
            names.update(v.name for v in graph.output if v.name not in made)
    return names - {""}
