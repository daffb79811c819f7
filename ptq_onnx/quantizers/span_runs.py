"""Runs a span of a graph node by node in ONNX Runtime, many batches at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.spans import Span
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.engine.node_sessions import NodeKernels

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
        quantized, name = active(node), name_of(node)
        names = kernels.inputs(name)
        made = [
            kernels.run(name, quantized, dict(zip(names, values, strict=True)))
            for values in zip(*(stream[n] for n in names), strict=True)
        ]
        for index, value in enumerate(v for v in node.outputs if v.name):
            if left[str(value.name)]:
                stream[str(value.name)] = [batch[index] for batch in made]
        for read in names:
            left[read] -= 1
            if not left[read]:
                del stream[read]
                gone(read)
        advance(place / len(span.nodes))
