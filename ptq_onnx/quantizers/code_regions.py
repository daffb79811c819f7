"""What ``deploy`` puts on codes between convolutions, and with which numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import rows_in_weight
from ptq_onnx.blocks.region_ops import MOVING, clipped_to, only_clips, reader_of, result_of
from ptq_onnx.blocks.regions import Regions, find_regions
from ptq_onnx.blocks.walking import consumers, is_layout, keeps_range
from ptq_onnx.graph.formula import constant, scalar
from ptq_onnx.graph.known_sizes import note_elements
from ptq_onnx.numerics.spec import Rule, Site, TensorSpec

Array = NDArray[np.float32]
LEVELS = 255
BEYOND = 1.03
"""How far past the end of what counts codes reach: a zero point is a whole number of steps."""
UNIT = frozenset(("Sigmoid", "HardSigmoid"))
"""Activation functions from 0 to 1."""
DEAD = {
    "Gelu": -4.5, "QuickGelu": -6.0, "Silu": -12.0, "Relu": 0.0, "HardSwish": -3 * BEYOND,
}  # fmt: skip
"""Below it an activation function gives zero, but for 1e-4: codes there would be wasted. Only where
what it reads has codes of its own."""


def regions_with(model: ir.Model, sites: Mapping[str, Site], kept: Collection[str]) -> Regions:
    """The regions without tensors that are kept in float, or are no sites."""
    blocked = set(kept)
    note_elements(model)
    while True:
        found = find_regions(model.graph, blocked)
        missing = {t for t in found.tensors if t not in sites} - blocked
        if not missing:
            return found
        blocked |= missing


def known_range(value: ir.Value) -> tuple[float, float] | None:
    """The range that a tensor has whatever the image: of what a sigmoid makes, and of the gate
    clip(u + c, 0, 2c). Where u is clipped first, all steps of it are steps of the gate: nothing is
    rounded twice, and its top, which most large values have, is exact."""
    node = value.producer()
    if node is not None and node.op_type in UNIT:
        return 0.0, 1.0
    bounds = clipped_to(value)
    if node is None or bounds is None or node.inputs[0] is None:
        return None
    if node.op_type == "Clip" and _shift_behind(value) is not None:
        return bounds
    shift = _shift_of(node.inputs[0].producer())
    if shift is None:
        return None
    if node.op_type == "Clip":
        return bounds if bounds[1] == np.float32(2 * shift) or _near(bounds[1], 2 * shift) else None
    first = node.inputs[0].producer()
    before = None if first is None or first.inputs[0] is None else clipped_to(first.inputs[0])
    if before is None or not np.isfinite(before[1]):
        return None
    return 0.0, (before[1] + shift) * LEVELS / (LEVELS - 1)


def _shift_behind(value: ir.Value) -> float | None:
    """The constant of a sum that alone reads the value."""
    readers = [n for n, _ in consumers(value)]
    return _shift_of(readers[0]) if len(readers) == 1 else None


def _shift_of(node: ir.Node | None) -> float | None:
    return scalar(node.inputs[1]) if node is not None and node.op_type == "Add" else None


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-5 * abs(other)


def least(value: ir.Value) -> float:
    """Below it what reads u makes zero: u · clip(u + c, 0, 2c), or an activation function, with or
    without factors per channel in front of it; −∞ else. A step further counts as well, so that the
    codes reach it."""
    readers = [node for node, _ in consumers(value)]
    dead = -np.inf if value.is_graph_output() else min(map(_dead_below, readers), default=-np.inf)
    if np.isfinite(dead):
        return dead
    gates = [node for node in readers if any(constant(v) is not None for v in node.inputs)]
    if len(readers) != 2 or len(gates) != 1:
        return -np.inf
    factor, shift = 1.0, _shift_of(gates[0])
    if gates[0].op_type == "Mul":  # divided by factors per channel (``equalization/gates.py``)
        numbers, clip = constant(gates[0].inputs[1]), [n for n, _ in consumers(gates[0].outputs[0])]
        if numbers is None or len(clip) != 1 or not only_clips(clip[0]) or numbers.min() <= 0:
            return -np.inf
        factor, shift = float(numbers.min()), _shift_behind(clip[0].outputs[0])
    return -np.inf if shift is None else -shift * BEYOND / factor


def _dead_below(node: ir.Node) -> float:
    """Where an activation function, or one behind positive factors per channel, begins to make
    something of what the node reads, in the channel where it does so first; −∞ for other ops."""
    smallest = 1.0
    if node.op_type == "Mul":
        factors, behind = constant(node.inputs[1]), reader_of(node.outputs[0])
        smallest = 0.0 if factors is None else float(factors.min())
        if behind is None or smallest <= 0:
            return -np.inf
        node = behind
    return DEAD.get(node.op_type, -np.inf) / smallest


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


def with_same_numbers(regions: Regions, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The specs, where an op that only picks numbers gives the codes that it reads, and a sum with
    constants has the steps of what it reads, so that it rounds nothing."""
    found = dict(specs)
    for node in sorted_by_graph(regions):
        read, made = node.inputs[0], result_of(node)
        one, other = (found.get(str(v.name)) for v in (read or made, made))
        if one is None or other is None:
            continue
        if node.op_type in MOVING:
            found[other.tensor] = replace(one, tensor=other.tensor)
        number = None if node.op_type != "Add" else found.get(str((node.inputs[1] or made).name))
        if number is not None and known_range(made) is None:
            scale = np.maximum(one.scale, other.scale)
            for spec in (one, other):
                found[spec.tensor] = with_step(spec, scale)
            found[number.tensor] = replace(number, scale=scale)
    return found


def with_moved_numbers(
    graph: Iterable[ir.Node], specs: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec]:
    """The specs, where what ops make that pick or interpolate numbers has the codes that they
    read, whatever it was calibrated to."""
    found = dict(specs)
    for node in graph:
        one = found.get(str(node.inputs[0].name)) if node.inputs and node.inputs[0] else None
        other = found.get(str(node.outputs[0].name))
        if one is not None and other is not None and keeps_range(node) and not is_layout(node):
            found[other.tensor] = replace(one, tensor=other.tensor)
    return found


def with_step(spec: TensorSpec, scale: Array) -> TensorSpec:
    """The spec with a larger step, around the same range."""
    ratio = float(spec.scale) / float(scale)
    if ratio == 1.0:
        return spec
    smallest, largest = spec.rule.limits
    middle = (smallest + largest) / 2
    # What is left over goes to both sides; zero stays a code.
    zero = np.clip(np.rint(middle + (spec.zero_point - middle) * ratio), smallest, largest)
    zero = zero.astype(np.int32)
    ends = (float((edge - int(zero)) * scale) for edge in (smallest, largest))
    return replace(spec, scale=np.asarray(scale), zero_point=zero, clip=(next(ends), next(ends)))


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
