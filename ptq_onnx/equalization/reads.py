"""A copy of its own for each product that reads a tensor beside other ops.

A runtime computes the product in integers, the other readers in float. Where they read one tensor,
its codes are made behind a copy, which the product alone reads: q beside an Einsum of relative
positions, a residual stream that a linear reads without a norm, a feature that is an output too.
Copies (Identity) are not in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Container

import onnx_ir as ir

from ptq_onnx.blocks.regions import Regions
from ptq_onnx.blocks.roles import RESIDUALS, Blocks, Role
from ptq_onnx.blocks.sites import CUTS, places, readers
from ptq_onnx.blocks.walking import (
    consumers,
    is_constant,
    is_layout,
    is_linear,
    is_product,
    name_of,
)
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.graph.formula import unique_name

Takes = Callable[[ir.Node, int], bool]
"""Whether the runtime computes an op, as the reader of its input of that index, in integers."""


def integer_readers(
    config: QuantizeConfig, blocks: Blocks, regions: Regions | None = None
) -> Takes:
    """What reads codes in a file of ``deploy``: products, and adds that take their skip so.
    Where ``regions`` make a tensor as codes, there is one set of them for all that read it."""
    inside = Regions() if regions is None else regions

    def takes(node: ir.Node, index: int) -> bool:
        if config.runtime.all_codes:
            return True
        if node.op_type == "Conv":
            enters = node in inside.convolutions and node.inputs[0] in inside.entering
            return (config.runtime.convolutions or enters) and index == 0
        if node.op_type == "Add":
            return config.quantize_residual and blocks.roles[name_of(node)].name in RESIDUALS
        return is_product(node) or (is_linear(node) and index == 0)

    return takes


def own_reads(
    model: ir.Model,
    blocks: Blocks,
    takes: Takes,
    *,
    at_run_time: bool = False,
    whole: bool = False,
) -> dict[str, Role]:
    """Put copies in front of products whose input has other readers; returns their roles.

    A product that reads the tensor joined to others by a Concat reads those codes, one that reads
    it by itself has its own, and so has one that reads a part of what another reads; ``whole``: all
    of the graph is on codes, and there is one set for all.
    ``at_run_time``: also behind layout ops, over which ONNX Runtime does not move codes whose scale
    it finds itself, and where the vectors are those that the product sums over.
    """
    graph = model.graph
    roles: dict[str, Role] = {}
    for value in [*graph.inputs, *(v for node in graph for v in node.outputs)]:
        node = value.producer()
        if value.is_initializer() or (node is not None and (is_layout(node) or is_constant(value))):
            continue
        for place in places(value):
            leaves = readers(place)
            wanted = [leaf for leaf in leaves if takes(*leaf)]
            alone = len(wanted) == len(leaves) and not _is_output(place)
            if not whole:
                for kinds in (("Concat",), CUTS):
                    alone = alone and len({_is_behind(kinds, place, *leaf) for leaf in leaves}) == 1
            for reader, index in wanted:
                if alone and not (at_run_time and reader.inputs[index] is not place):
                    continue
                copied = _copy(graph, reader, index)
                block = blocks.roles[name_of(reader)].block
                roles[name_of(copied)] = Role(block, "layout")
    return roles


def _is_behind(kinds: Container[str], place: ir.Value, reader: ir.Node, index: int) -> bool:
    """True where one of the layout ops through which a reader reads the tensor is of a kind: a
    Concat with others, or one that takes a part."""
    read = reader.inputs[index]
    while read is not None and read is not place:
        node = read.producer()
        if node is None or node.op_type in kinds:
            return node is not None
        read = node.inputs[0]
    return False


def _is_output(place: ir.Value) -> bool:
    """True where the graph gives the tensor out, as it is or behind layout ops."""
    if place.is_graph_output():
        return True
    behind = (n for n, i in consumers(place) if is_layout(n) and (i == 0 or n.op_type == "Concat"))
    return any(_is_output(v) for n in behind if n.op_type != "Shape" for v in n.outputs)


def _copy(graph: ir.Graph, reader: ir.Node, index: int) -> ir.Node:
    """The copy of what ``reader`` reads; one for all readers of one tensor."""
    value = reader.inputs[index]
    assert value is not None
    for node, _ in consumers(value):
        if node.op_type == "Identity" and not node.outputs[0].is_graph_output():
            reader.replace_input_with(index, node.outputs[0])
            return node
    name = unique_name(graph, f"{value.name}_read")
    node = ir.node("Identity", [value], name=f"{name}_node")
    output = node.outputs[0]
    output.name, output.type, output.shape = name, value.type, value.shape
    producer = value.producer()
    if producer is None:
        graph.insert_before(next(iter(graph)), node)
    else:
        graph.insert_after(producer, node)
    reader.replace_input_with(index, output)
    return node
