"""What a network's outputs lose where the tensors of a stream are rounded, measured on images.

Errors of single tensors do not tell a matrix from factors per channel: with a factor of its own a
channel's rounding is alike in all tokens and adds up, spread it is noise that averages out. Nor do
they tell good steps from bad: a massive channel is nearly constant, and what its rounding leaves is
a matter of where the constant lies between two codes. So the float model is run with the tensors of
the stream rounded, and its outputs are compared. Few images show it: what is alike in all tokens is
alike in all images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.calibration.statistics import open_taps
from ptq_onnx.numerics.ptf import Factors
from ptq_onnx.preparation import model_files as graphs

Double = NDArray[np.float64]
Single = NDArray[np.float32]
Outputs = list[list[NDArray[Any]]]

BATCHES = 4
"""Batches that a trial takes."""
FACTORS = 2.0 ** (np.array([-4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7]) / 8)
"""Factors of all steps that are tried: an octave up, as powers of two come round there but for what
is clipped, and half of one down."""
PARTS = ("inverse", "lowest", "highest", "step")
"""Of what a tensor is rounded by."""
OF_ONE = 2.0 ** (np.array([-1, 1, 2]) / 4)
"""Factors of one tensor's steps."""
ENOUGH = 0.98
"""Part of the loss that one tensor's steps may leave, to be taken."""


@dataclass(frozen=True)
class Steps:
    """Codes of a tensor: a step [1] or one per channel [C], and the smallest and largest code."""

    step: Single
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

    @classmethod
    def unrounded(cls) -> Steps:
        """So fine that nothing is lost: float32 has no digits behind these, or no use for them."""
        return cls(np.array([2.0**-20], np.float32), -np.inf, np.inf)

    def times(self, factor: float) -> Steps:
        """The same codes of other values."""
        return replace(self, step=self.step * np.float32(factor))


class StreamTrial:
    """A float model, the tensors of a stream in which are rounded by steps that each run is given.

    ``batches`` [B, C, H, W] are kept. ``original``: what nothing rounded gives. The model stays as
    it is.
    """

    def __init__(
        self,
        model: ir.Model,
        tensors: Iterable[str],
        batches: Iterable[Any],
        threads: int,
        original: Outputs | None = None,
    ) -> None:
        standard = graphs.to_standard(model.clone())
        values = {str(v.name): v for node in standard.graph for v in node.outputs}
        for name in tensors:
            _round(standard.graph, values[name])
        self._session, self._feed, _ = open_taps(standard, (), threads)
        self._batches = list(batches)
        self._original = [] if original is None else original

    def outputs(self, steps: Mapping[str, Steps]) -> Outputs:
        """The model's outputs on each batch, every tensor rounded by its steps."""
        fed: dict[str, Single] = {}
        for name, one in steps.items():
            lowest, highest = (np.array([end], np.float32) for end in (one.lowest, one.highest))
            inverse = np.asarray(1 / one.step, np.float32)
            numbers = (inverse, lowest, highest, one.step)
            fed |= {f"{name}_{part}": v for part, v in zip(PARTS, numbers, strict=True)}
        return [self._session.run(None, {self._feed: batch, **fed}) for batch in self._batches]

    def lost(self, steps: Mapping[str, Steps]) -> float:
        """What the outputs lose, Σ error² / Σ signal²."""
        return loss(self.outputs(steps), self._original)


@dataclass(frozen=True)
class Refined:
    """What the outputs lose (Σ error² / Σ signal²) with steps as found, and with each tensor's
    times its factor."""

    before: float
    after: float
    factors: Mapping[str, float]


def refined(trial: StreamTrial, steps: Mapping[str, Steps]) -> Refined:
    """Factors of the steps that leave less of the outputs' loss: one for all tensors, then of one
    tensor after the other, the last ones, whose rounding is the coarsest, first. A tensor without
    whose rounding the outputs lose no less is passed over."""

    def lost(factors: Mapping[str, float], without: str | None = None) -> float:
        held = {name: one.times(factors[name]) for name, one in steps.items()}
        return trial.lost(held if without is None else held | {without: Steps.unrounded()})

    before = least = lost(dict.fromkeys(steps, 1.0))
    found: dict[str, float] = dict.fromkeys(steps, 1.0)
    for factor in FACTORS:
        tried = dict.fromkeys(steps, float(factor))
        now = lost(tried)
        if now < least:
            found, least = tried, now
    for name in reversed(list(steps)):
        if lost(found, without=name) >= least:
            continue
        each = [{**found, name: found[name] * float(factor)} for factor in OF_ONE]
        losses = [lost(tried) for tried in each]
        if min(losses) < ENOUGH * least:
            least = min(losses)
            found = each[losses.index(least)]
    return Refined(before, least, found)


def some_of(batches: Iterable[Any]) -> list[Any]:
    """``BATCHES`` of the batches, spread over all: calibration images often come class by class."""
    kept: list[Any] = []
    stride = 1
    for number, batch in enumerate(batches):
        if number % stride == 0:
            kept.append(batch)
        if len(kept) == 2 * BATCHES:
            kept, stride = kept[::2], 2 * stride
    places = np.linspace(0, len(kept) - 1, min(BATCHES, len(kept))).round().astype(int)
    return [kept[place] for place in places]


def outputs_of(model: ir.Model, batches: Iterable[Any], threads: int) -> Outputs:
    """The outputs, nothing rounded; the model stays as it is."""
    return StreamTrial(model, (), batches, threads).outputs({})


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


def _round(graph: ir.Graph, value: ir.Value) -> None:
    """Let the readers of a tensor read it rounded, by inputs of the graph."""
    before = value.producer()
    assert before is not None
    uses = [(use.node, use.idx) for use in value.uses()]
    fed = {
        part: ir.Value(
            name=f"{value.name}_{part}",
            shape=ir.Shape([f"{value.name}_{part}_channels"]),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        for part in PARTS
    }
    graph.inputs.extend(fed.values())
    made = [ir.node("Mul", [value, fed["inverse"]])]
    made.append(ir.node("Round", [made[-1].outputs[0]]))
    made.append(ir.node("Max", [made[-1].outputs[0], fed["lowest"]]))
    made.append(ir.node("Min", [made[-1].outputs[0], fed["highest"]]))
    made.append(ir.node("Mul", [made[-1].outputs[0], fed["step"]]))
    for number, node in enumerate(made):
        node.outputs[0].name = f"{value.name}_trial_{number}"
        node.name = f"{value.name}_trial_{number}_node"
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    graph.insert_after(before, made)
    for node, index in uses:
        node.replace_input_with(index, made[-1].outputs[0])
