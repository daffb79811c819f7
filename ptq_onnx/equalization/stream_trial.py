"""What a network's outputs lose where the tensors of a stream are rounded, measured on images.

Errors of single tensors do not tell a matrix from factors per channel: with a factor of its own a
channel's rounding is alike in all tokens and adds up, spread it is noise that averages out. Nor do
they tell good steps from bad: a massive channel is nearly constant, and what its rounding leaves is
a matter of where the constant lies between two codes. So the float model is run with the tensors of
the stream rounded, and its outputs are compared. Few images show it: what is alike in all tokens is
alike in all images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ptq_onnx.calibration.statistics import open_taps
from ptq_onnx.equalization.stream_suffix import Kept, Suffixes, open_suffix
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
HOPELESS = 1.03
"""Times the best loss on the same first batches, above which the others are not tried."""


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

    def is_same(self, other: Steps) -> bool:
        """Whether all numbers are equal."""
        ends = self.lowest == other.lowest and self.highest == other.highest
        return ends and np.array_equal(self.step, other.step)


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
        self._model = standard = graphs.to_standard(model.clone())
        values = {str(v.name): v for node in standard.graph for v in node.outputs}
        self._tensors = tuple(tensors)
        for name in self._tensors:
            _round(standard.graph, values[name])
        self._session, self._feed, _ = open_taps(standard, (), threads)
        self._batches, self._threads = list(batches), threads
        self._original = [] if original is None else original
        self._suffixes: Suffixes | None = None
        self._kept, self._kept_with = Kept(), dict[str, Steps]()
        self._behind: tuple[ort.InferenceSession, list[Any]] | None = None

    def outputs(self, steps: Mapping[str, Steps]) -> Outputs:
        """The model's outputs on each batch, every tensor rounded by its steps."""
        return list(self._runs(steps))

    def lost(self, steps: Mapping[str, Steps], best: Sequence[float] = ()) -> list[float]:
        """What the outputs lose by one batch, two, … and all of them, Σ error² / Σ signal².
        ``best``: such a list to fall below; without hope of that the last batches are not run, and
        the last number is infinite."""
        found: list[float] = []
        for total in losses(self._runs(steps), self._original):
            found.append(total)
            if best and (total >= best[-1] or total > HOPELESS * best[len(found) - 1]):
                return [*found[:-1], np.inf]
        return found

    def start_at(self, tensor: str, steps: Mapping[str, Steps]) -> None:
        """Begin every run at the tensor from here on, where that can be: all that does not depend
        on it is kept as it is with these ``steps``. Begun with the last tensors, it is quickest."""
        if self._suffixes is None:
            given = {name: [f"{name}_{part}" for part in PARTS] for name in self._tensors}
            self._suffixes = Suffixes(self._model, given)
        self._behind = None
        suffix = self._suffixes.of(tensor)
        if suffix is None:
            return
        before = [name for name in steps if not suffix.rounds(name)]
        same = all(n in self._kept_with and steps[n].is_same(self._kept_with[n]) for n in before)
        if tensor not in self._kept or not same:
            upto = self._tensors[: self._tensors.index(tensor) + 1]
            self._kept = self._suffixes.kept(upto, self._inputs(steps), self._threads)
            self._kept_with = dict(steps)
        self._behind = open_suffix(suffix, self._threads), self._kept.pop(tensor)

    def _inputs(self, steps: Mapping[str, Steps]) -> list[dict[str, Any]]:
        """What the whole model is given, batch by batch."""
        return [{self._feed: batch, **_numbers(steps)} for batch in self._batches]

    def _runs(self, steps: Mapping[str, Steps]) -> Iterator[list[NDArray[Any]]]:
        session, inputs = self._session, self._inputs(steps)
        if self._behind is not None:
            session, before = self._behind
            read = {i.name for i in session.get_inputs()}
            numbers = {n: v for n, v in _numbers(steps).items() if n in read}
            inputs = [{**values, **numbers} for values in before]
        for fed in inputs:
            yield session.run(None, fed)


def _numbers(steps: Mapping[str, Steps]) -> dict[str, Single]:
    """What a model is given to round the tensors."""
    fed: dict[str, Single] = {}
    for name, one in steps.items():
        lowest, highest = (np.array([end], np.float32) for end in (one.lowest, one.highest))
        inverse = np.asarray(1 / one.step, np.float32)
        numbers = (inverse, lowest, highest, one.step)
        fed |= {f"{name}_{part}": v for part, v in zip(PARTS, numbers, strict=True)}
    return fed


@dataclass(frozen=True)
class Refined:
    """What the outputs lose (Σ error² / Σ signal²) with steps as found, and with each tensor's
    times its factor."""

    before: float
    after: float
    factors: Mapping[str, float]


def refined(
    trial: StreamTrial, steps: Mapping[str, Steps], before: list[float] | None = None
) -> Refined:
    """Factors of the steps that leave less of the outputs' loss: one for all tensors, then of one
    tensor after the other, the last ones, whose rounding is the coarsest, first. A tensor without
    whose rounding the outputs lose no less is passed over. ``before``: the loss with the steps as
    they are (see :meth:`StreamTrial.lost`), where it is known."""

    def held(factors: Mapping[str, float]) -> dict[str, Steps]:
        return {name: one.times(factors[name]) for name, one in steps.items()}

    least = before = trial.lost(steps) if before is None else before
    found: dict[str, float] = dict.fromkeys(steps, 1.0)
    for factor in FACTORS:
        tried = dict.fromkeys(steps, float(factor))
        now = trial.lost(held(tried), least)
        if now[-1] < least[-1]:
            found, least = tried, now
    for name in reversed(list(steps)):
        trial.start_at(name, held(found))
        if trial.lost(held(found) | {name: Steps.unrounded()}, least)[-1] == np.inf:
            continue
        best, better = [ENOUGH * total for total in least], found
        for factor in OF_ONE:
            tried = {**found, name: found[name] * float(factor)}
            now = trial.lost(held(tried), best)
            if now[-1] < best[-1]:
                best = least = now
                better = tried
        found = better
    return Refined(before[-1], least[-1], found)


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


def losses(rounded: Iterable[Sequence[NDArray[Any]]], original: Outputs) -> Iterator[float]:
    """Σ (q - f)² / Σ f² of each output of floats, added up: Σ (q - f)² over the first batch, the
    first two, … all of them, Σ f² over all."""
    errors = defaultdict[int, list[float]](list)
    columns = enumerate(zip(*original, strict=True))
    floats = {number: fs for number, fs in columns if fs[0].dtype.kind == "f"}
    signals = {
        number: max(sum(float((f.astype(np.float64) ** 2).sum()) for f in fs), 1e-30)
        for number, fs in floats.items()
    }
    for batch, found in enumerate(rounded):
        for number, fs in floats.items():
            error = found[number].astype(np.float64) - fs[batch].astype(np.float64)
            errors[number].append(float((error**2).sum()))
        yield sum(sum(errors[number]) / signal for number, signal in signals.items())


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
