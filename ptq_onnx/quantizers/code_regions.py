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
    found = _into_gate(value)
    if found is not None:
        return found
    bounds = clipped_to(value)
    return bounds if bounds is not None and _gates(value) else None


def _into_gate(value: ir.Value) -> tuple[float, float] | None:
    """−c to d − c for what only clip(· + c, 0, d) reads: it is that range of it that shows."""
    readers = [n for n, _ in consumers(value)]
    shift = scalar(readers[0].inputs[1]) if [n.op_type for n in readers] == ["Add"] else None
    behind = [] if shift is None else [n for n, _ in consumers(readers[0].outputs[0])]
    if shift is None or len(behind) != 1:
        return None
    bounds = clipped_to(behind[0].outputs[0]) if only_clips(behind[0]) else None
    return None if bounds is None else (-shift, bounds[1] - shift)


def least(value: ir.Value) -> float:
    """Below it HardSwish is zero, where that alone reads the value: −∞ else."""
    readers = [node for node, _ in consumers(value)]
    gates = [node for node in readers if any(constant(v) is not None for v in node.inputs)]
    products = [node for node in readers if node.op_type == "Mul" and node not in gates]
    if len(readers) != 2 or len(gates) != 1 or len(products) != 1:
        return -np.inf
    factor, gate = 1.0, gates[0]
    if gate.op_type == "Mul":  # divided by factors per channel (``equalization/gates.py``)
        numbers, behind = constant(gate.inputs[1]), [n for n, _ in consumers(gate.outputs[0])]
        if numbers is None or len(behind) != 1 or float(numbers.min()) <= 0:
            return -np.inf
        factor, gate = float(numbers.min()), behind[0]
    shift = scalar(gate.inputs[1]) if gate.op_type == "Add" else None
    clips = [n for n, _ in consumers(gate.outputs[0])]
    if shift is None or len(clips) != 1 or not only_clips(clips[0]):
        return -np.inf
    return -shift / factor if clips[0].outputs[0] in products[0].inputs else -np.inf


def _gates(value: ir.Value) -> bool:
    """True for clip(u + c, 0, d) that u alone is multiplied by."""
    node = value.producer()
    before = None if node is None or node.inputs[0] is None else node.inputs[0].producer()
    readers = [n for n, _ in consumers(value)]
    if before is None or before.op_type != "Add" or len(readers) != 1:
        return False
    start = before.inputs[0]
    scaled = None if start is None else start.producer()
    starts = {start, None if scaled is None or scaled.op_type != "Mul" else scaled.inputs[0]}
    return readers[0].op_type == "Mul" and any(v in starts for v in readers[0].inputs)


def number_spec(site: Site, rule: Rule, numbers: Array) -> TensorSpec:
    """Codes of numbers of one sign: the largest has the last code, and a single one is exact."""
    low, high = float(numbers.min()), float(numbers.max())
    step = max(abs(low), abs(high), float(np.finfo(np.float32).tiny)) / LEVELS
    return TensorSpec(
        tensor=site.tensor,
        rule=rule,
        scale=np.array(step, np.float32),
        zero_point=np.array(LEVELS if low < 0 else 0, np.int32),
        clip=(min(low, 0.0), max(high, 0.0)),
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
