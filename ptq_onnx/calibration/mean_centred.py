"""Attention values without the mean of their image: A V = A (V - v) + v, v the mean over tokens.

Exact, because the rows of a softmax sum to one. It pays where the rounded A has a coarse step:
most weights of a row are then rounded to zero, its sum is no longer one, and what is missing
multiplies V. Without the mean common to all tokens of the image less is lost, and V itself needs
a smaller range. Idea: SageAttention2 (arXiv 2411.10958), "smooth V", there for FP8 accumulators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_layout, is_product
from ptq_onnx.calibration.methods import Statistics, collect
from ptq_onnx.graph.formula import new_constant
from ptq_onnx.numerics.around.token_mean import TOKENS
from ptq_onnx.numerics.spec import Site

SUFFIX = "/centred"


def rows_sum_to_one(product: ir.Node) -> bool:
    """True where the first input of a product is a softmax over its last axis."""
    attention = product.inputs[0]
    softmax = None if attention is None else attention.producer()
    if softmax is None or softmax.op_type != "Softmax" or attention is None:
        return False
    rank = 0 if attention.shape is None else len(attention.shape)
    return softmax.attributes.get_int("axis", -1) in (-1, rank - 1)


def static_tokens(value: ir.Value) -> int:
    """How many tokens V has; 0 where that is known at run time only."""
    size = 0 if value.shape is None or len(value.shape) < 2 else value.shape[TOKENS]
    return size if isinstance(size, int) else 0


def takes_centring(value: ir.Value) -> bool:
    """True for a V of a known number of tokens that one product alone reads, behind a softmax,
    and that a layout op makes.

    What another op makes is quantized there, before the mean is known to the product.
    """
    uses, producer = list(value.uses()), value.producer()
    if not static_tokens(value):
        return False
    if producer is None or not is_layout(producer) or len(uses) != 1 or value.is_graph_output():
        return False
    node, index = uses[0].node, uses[0].idx
    return is_product(node) and index == 1 and rows_sum_to_one(node)


def collect_centred(
    model: ir.Model,
    sites: Sequence[Site],
    centred: Sequence[Site],
    batches: Iterable[NDArray[np.float32]],
    *,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
    workers: int = 1,
) -> Statistics:
    """Statistics of ``sites``, and of the ``centred`` ones without their mean, under their name
    and ``SUFFIX``; one run of the batches, by so many ``workers``."""
    run = partial(collect, threads=threads, progress=progress, workers=workers)
    if not centred:
        return run(model, sites, batches)
    probe = model.clone()
    values = {v.name: v for node in probe.graph for v in node.outputs}
    for site in centred:
        _insert(probe.graph, values[site.tensor])
    more = [replace(site, tensor=site.tensor + SUFFIX) for site in centred]
    return run(probe, [*sites, *more], batches)


def _insert(graph: ir.Graph, value: ir.Value) -> None:
    """A tensor ``value`` - its mean behind ``value``, for statistics; its readers stay.

    It is kept alive as an output; what taps it drops that again.
    """
    axes = new_constant(graph, f"{value.name}/tokens", np.array([TOKENS], np.int64))
    mean = ir.node("ReduceMean", [value, axes], name=f"{value.name}/mean_node")
    rest = ir.node("Sub", [value, mean.outputs[0]], name=f"{value.name}{SUFFIX}_node")
    mean.outputs[0].name, rest.outputs[0].name = f"{value.name}/mean", f"{value.name}{SUFFIX}"
    mean.outputs[0].type = rest.outputs[0].type = value.type
    rest.outputs[0].shape = value.shape
    producer = value.producer()
    assert producer is not None
    graph.insert_after(producer, [mean, rest])
