"""What a network's outputs lose where the tensors of a stream are rounded, measured on images.

Errors of single tensors do not tell a matrix from factors per channel: with a factor of its own a
channel's rounding is alike in all tokens and adds up, spread it is noise that averages out. So
the float model is run with each tensor of the stream rounded, and its outputs are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.calibration.statistics import open_taps
from ptq_onnx.graph.formula import new_constant
from ptq_onnx.numerics.ptf import Factors
from ptq_onnx.preparation import model_files as graphs

Double = NDArray[np.float64]
Outputs = list[list[NDArray[Any]]]

BATCHES = 8
"""Batches that a trial takes at most."""


@dataclass(frozen=True)
class Steps:
    """Codes of a tensor: a step [1] or one per channel [C], and the smallest and largest code."""

    step: NDArray[np.float32]
    lowest: float
    highest: float

    @classmethod
    def of_range(cls, low: float, high: float, levels: int) -> Steps:
        """One step for all, zero among the codes."""
        step = max((high - low) / (levels - 1), 1e-30)
        lowest = float(np.rint(low / step))
        return cls(np.array([step], np.float32), lowest, lowest + levels - 1)

    @classmethod
    def of_factors(cls, found: Factors, levels: int) -> Steps:
        """A power of two per channel."""
        step = found.scale * np.exp2(found.alpha.astype(np.float64))
        return cls(step.astype(np.float32), -found.zero_point, levels - 1 - found.zero_point)


def outputs_of(
    model: ir.Model, steps: Mapping[str, Steps], batches: Iterable[Any], threads: int
) -> Outputs:
    """The outputs on the first batches, tensors with steps rounded; the model stays as it is."""
    standard = graphs.to_standard(model.clone())
    values = {str(v.name): v for node in standard.graph for v in node.outputs}
    for name, one in steps.items():
        _round(standard.graph, values[name], one)
    session, feed, _ = open_taps(standard, (), threads)
    return [session.run(None, {feed: batch}) for batch in islice(iter(batches), BATCHES)]


def loss(rounded: Outputs, original: Outputs) -> float:
    """Σ (q - f)² / Σ f² of each output of floats over all batches, added up."""
    total = 0.0
    for one, other in zip(zip(*rounded, strict=True), zip(*original, strict=True), strict=True):
        if other[0].dtype.kind == "f":
            pairs = [
                (q.astype(np.float64), f.astype(np.float64))
                for q, f in zip(one, other, strict=True)
            ]
            signal = sum(float((f**2).sum()) for _, f in pairs)
            total += sum(float(((q - f) ** 2).sum()) for q, f in pairs) / max(signal, 1e-30)
    return total


def _round(graph: ir.Graph, value: ir.Value, steps: Steps) -> None:
    """Let the readers of a tensor read it rounded."""
    before = value.producer()
    assert before is not None
    uses = [(use.node, use.idx) for use in value.uses()]
    name = f"{value.name}_trial"
    inverse = new_constant(graph, f"{name}_inverse", (1 / steps.step).astype(np.float32))
    ends = [
        new_constant(graph, f"{name}_end", np.array(end, np.float32))
        for end in (steps.lowest, steps.highest)
    ]
    step = new_constant(graph, f"{name}_step", steps.step)
    made = [ir.node("Mul", [value, inverse])]
    made.append(ir.node("Round", [made[-1].outputs[0]]))
    made.append(ir.node("Clip", [made[-1].outputs[0], *ends]))
    made.append(ir.node("Mul", [made[-1].outputs[0], step]))
    for number, node in enumerate(made):
        node.outputs[0].name = f"{name}_{number}"
        node.name = f"{name}_{number}_node"
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    graph.insert_after(before, made)
    for node, index in uses:
        node.replace_input_with(index, made[-1].outputs[0])
