"""What ``deploy`` puts on codes between convolutions, and with which numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import rows_in_weight
from ptq_onnx.blocks.regions import MOVING, Regions, clipped_to, find_regions, only_clips
from ptq_onnx.blocks.walking import consumers
from ptq_onnx.graph.formula import constant, scalar
from ptq_onnx.numerics.spec import Rule, Site, TensorSpec

Array = NDArray[np.float32]
LEVELS = 255
UNIT = frozenset(("Sigmoid", "HardSigmoid"))
"""Activation functions from 0 to 1."""


def regions_with(
    graph: ir.Graph, sites: Mapping[str, Site], kept: Collection[str]
) -> Regions:
    """The regions without tensors that are kept in float, or are no sites."""
    blocked = set(kept)
    while True:
        found = find_regions(graph, blocked)
        missing = {t for t in found.tensors if t not in sites} - blocked
        if not missing:
            return found
        blocked |= missing


def known_range(value: ir.Value) -> tuple[float, float] | None:
    """The range that a tensor has whatever the image: of a gate, and of what a sigmoid makes."""
    node = value.producer()
    if node is not None and node.op_type in UNIT:
        return 0.0, 1.0
    bounds = clipped_to(value)
    return bounds if bounds is not None and _gates(value) else None


def least(value: ir.Value) -> float:
    """Below it HardSwish is zero, where that alone reads the value: −∞ else."""
    readers = list(consumers(value))
    sums = [node for node, _ in readers if node.op_type == "Add"]
    products = [node for node, _ in readers if node.op_type == "Mul"]
    if len(readers) != 2 or len(sums) != 1 or len(products) != 1:
        return -np.inf
    shift, clip = scalar(sums[0].inputs[1]), list(consumers(sums[0].outputs[0]))
    if shift is None or len(clip) != 1 or not only_clips(clip[0][0]):
        return -np.inf
    return -shift if clip[0][0].outputs[0] in products[0].inputs else -np.inf


def _gates(value: ir.Value) -> bool:
    """True for clip(u + c, 0, d) that u alone is multiplied by."""
    node = value.producer()
    before = None if node is None or node.inputs[0] is None else node.inputs[0].producer()
    readers = [n for n, _ in consumers(value)]
    if before is None or before.op_type != "Add" or len(readers) != 1:
        return False
    return readers[0].op_type == "Mul" and before.inputs[0] in readers[0].inputs


def number_spec(site: Site, rule: Rule, number: float) -> TensorSpec:
    """Codes of one number that hold it exactly: the largest code, or the smallest below zero."""
    step = max(abs(number), np.finfo(np.float32).tiny) / LEVELS
    return TensorSpec(
        tensor=site.tensor,
        rule=rule,
        scale=np.array(step, np.float32),
        zero_point=np.array(LEVELS if number < 0 else 0, np.int32),
        clip=(min(number, 0.0), max(number, 0.0)),
    )


def with_same_numbers(
    regions: Regions, specs: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec]:
    """The specs, where an op that only picks numbers gives the codes that it reads."""
    found = dict(specs)
    for node in sorted_by_graph(regions):
        read, made = node.inputs[0], node.outputs[0]
        spec = None if read is None else found.get(str(read.name))
        if node.op_type in MOVING and spec is not None and str(made.name) in found:
            found[str(made.name)] = replace(spec, tensor=str(made.name))
    return found


def sorted_by_graph(regions: Regions) -> Iterable[ir.Node]:
    """The regions' ops but for convolutions, as the data flows."""
    made = {v: i for i, v in enumerate(regions.codes)}
    return sorted(regions.ops, key=lambda node: made.get(node.outputs[0], 0))


def row_power(conv: ir.Node) -> NDArray[np.float64] | None:
    """Σ W² of the weights behind each input channel of a convolution, [C]."""
    weight = constant(conv.inputs[1])
    if weight is None:
        return None
    channels = weight.shape[1] * conv.attributes.get_int("group", 1)
    rows = rows_in_weight(conv, np.arange(channels, dtype=np.float32)).astype(np.int64)
    power = np.zeros(channels)
    square = np.square(np.asarray(weight, np.float64)).sum(axis=(2, 3), keepdims=True)
    np.add.at(power, np.broadcast_to(rows, square.shape).ravel(), square.ravel())
    return power
