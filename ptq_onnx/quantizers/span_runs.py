"""Runs a span of a graph node by node in ONNX Runtime, many batches at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.spans import Span
from ptq_onnx.blocks.walking import is_constant, is_layout, name_of
from ptq_onnx.engine.node_sessions import NodeKernels
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.spec import TensorSpec

Stream = dict[str, list[NDArray[Any]]]
"""Tensors by name, in batches."""


def run_span(
    span: Span,
    kernels: NodeKernels,
    stream: Stream,
    active: Callable[[ir.Node], frozenset[str]],
    gone: Callable[[str], object] = lambda name: None,
    advance: Callable[[float], None] = lambda part: None,
) -> None:
    """Put the span's outputs into ``stream``, which has its inputs. ``active`` is asked before a
    node runs which tensors around it are quantized, ``gone`` told what is not read any more."""
    left = Counter(n for node in span.nodes for n in kernels.inputs(name_of(node)))
    left.update([*span.inputs, *span.outputs])
    for place, node in enumerate(span.nodes, 1):
        made = run_node(node, kernels, stream, active(node))
        for index, value in enumerate(v for v in node.outputs if v.name):
            if left[str(value.name)]:
                stream[str(value.name)] = [batch[index] for batch in made]
        for read in kernels.inputs(name_of(node)):
            left[read] -= 1
            if not left[read]:
                del stream[read]
                gone(read)
        advance(place / len(span.nodes))


def run_node(
    node: ir.Node, kernels: NodeKernels, stream: Stream, quantized: frozenset[str]
) -> list[Sequence[NDArray[Any]]]:
    """What a node makes of what it reads in ``stream``, batch by batch."""
    name, names = name_of(node), kernels.inputs(name_of(node))
    rows = zip(*(stream[n] for n in names), strict=True)
    return [kernels.run(name, quantized, dict(zip(names, row, strict=True))) for row in rows]


def quantized_around(
    node: ir.Node, specs: Mapping[str, TensorSpec], kernels: NodeKernels
) -> frozenset[str]:
    """Tensors around a node that it quantizes in a run: its weight, its output, and inputs that
    their own node has not quantized."""
    found = {str(v.name) for v in node.outputs if str(v.name) in specs and not _is_late(v, specs)}
    for value in node.inputs:
        if value is None:
            continue
        name = str(value.name)
        if name in kernels.carried or (name in specs and _is_late(value, specs)):
            found.add(name)
    return frozenset(found)


def _is_late(value: ir.Value, specs: Mapping[str, TensorSpec]) -> bool:
    """True for what its readers quantize: constants, what a layout op makes, the image, and rows
    that are divided by their sums behind the product."""
    node = value.producer()
    if node is None or is_layout(node) or is_constant(value):
        return True
    return RowMaximum() in specs[str(value.name)].rule.around
