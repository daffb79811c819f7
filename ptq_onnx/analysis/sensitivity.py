"""Layerwise and leave-one-out analysis: which module costs what, at the logits.

Layerwise: one module is quantized, the rest float. Leave-one-out: all are quantized but what
``--keep-float`` leaves in float for one; what that gives back. A run starts at the graph segment
that holds the module, from activations that all runs share, and ends in a session that all runs
share (see segments.py). Memory holds the images, one activation per image, and the weights of a
few sessions.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.analysis.decibels import decibels, difference
from ptq_onnx.analysis.errors import Sums, outputs_error
from ptq_onnx.analysis.graphwise import float_outputs
from ptq_onnx.analysis.modules import Module, find_modules
from ptq_onnx.analysis.results import Error, Sensitivity, Switched
from ptq_onnx.analysis.segments import Segments, Specs
from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.calibration.class_output import class_outputs, feature_outputs
from ptq_onnx.errors import ModelError
from ptq_onnx.images.source import ImageSource
from ptq_onnx.numerics.spec import Site, TensorSpec

Array = NDArray[np.float32]
Outcome = tuple[tuple[Array, ...], Array | None]
"""Outputs, as logits [N, classes], and features [N, …] where the model has them."""
Judged = tuple[Error, float | None]
"""The error of the logits, and the noise-to-signal ratio of the features."""
APART = ("kind", "block", "model")
"""Scopes whose weights and activations leave-one-out also takes apart; layerwise does for all."""


@dataclass(frozen=True)
class Images:
    """Model inputs [N, C, H, W], run ``batch`` at a time.

    ``count``: how many of them are images; the others fill up the last batch of a model
    with a fixed batch size.
    """

    values: Array
    batch: int = 8
    count: int = 0

    @property
    def real(self) -> int:
        """The number of images."""
        return self.count or len(self.values)


def load(source: ImageSource, fixed: int | None, batch: int) -> Images:
    """All images in memory; filled up to whole batches where the batch size is fixed."""
    values = np.concatenate(list(source.batches(batch)))
    count = len(values)
    missing = 0 if fixed is None else -count % fixed
    if missing:
        values = np.concatenate([values, np.repeat(values[-1:], missing, axis=0)])
    return Images(values, fixed or batch, count)


def sensitivity(
    model: ir.Model,
    specs: Mapping[str, TensorSpec],
    blocks: Blocks,
    sites: Mapping[str, Site],
    images: Images,
    *,
    held_apart: bool,
    reference: ir.Model | None = None,
    apart: bool = True,
    left_in_float: Callable[[Module], frozenset[str]] | None = None,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Sensitivity:
    """Both analyses of the float ``model`` with its ``specs``, on all ``images``.

    ``reference``: the float model that ``model`` came from, where that is another: its weights
    not yet rounded, its biases not yet corrected. Its logits are compared with, and a linear
    whose weight a run leaves in float has its constants, not ``model``'s. ``apart``: weights and
    activations also by themselves. ``left_in_float``: the tensors that leave-one-out leaves in
    float for a module, where they are not its own alone. ``progress`` is called with the number of
    runs done, of :func:`run_count`. Raises ModelError where there is no image.
    """
    if not len(images.values):
        raise ModelError("There are no images to analyse the quantized model on.")
    started = time.perf_counter()
    modules = [m for m in find_modules(model, blocks, sites, specs) if apart or m.part == "all"]
    features = _last_norm(model, blocks)
    start = partial(
        _Runs, reference or model, threads, features, None if reference is None else model
    )
    first = start()
    first.segments.run(images.values, 0, first.last, {}, images.batch)
    truth = first.measured(images)
    answers = bool(set(class_outputs(model)) - set(feature_outputs(model)))
    judge = partial(_judged, truth, answers=answers)
    alone = {m: {t: specs[t] for t in m.tensors} for m in modules}
    runs = start()
    layerwise = {m: judge(found) for m, found in runs.each({}, alone, images, progress)}
    taken = [m for m in modules if m.part == "all" or m.scope in APART]
    if left_in_float is not None:
        taken = [replace(m, tensors=left_in_float(m)) if m.part == "all" else m for m in taken]
    but = {m: {t: spec for t, spec in specs.items() if t not in m.tensors} for m in taken}
    runs = start()
    left = {m: judge(found) for m, found in runs.each(specs, but, images, progress)}
    baseline = judge(runs.baseline)
    return Sensitivity(
        images=images.real,
        held_apart=held_apart,
        baseline=baseline[0],
        baseline_features_db=None if baseline[1] is None else decibels(baseline[1]),
        baseline_features_snr=baseline[1],
        layerwise=tuple(_switched(m, layerwise[m], None) for m in alone),
        leave_one_out=tuple(_switched(m, left[m], baseline) for m in but),
        seconds=time.perf_counter() - started,
    )


def layerwise_errors(
    model: ir.Model,
    alone: Mapping[Module, Specs],
    images: Images,
    *,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[Module, Error]:
    """The error of the logits with the specs of one module, the rest float, for each module.

    ``progress`` is called with the number of modules done.
    """
    runs = _Runs(model, threads, None)
    found = dict(runs.each({}, alone, images, progress))
    return {m: outputs_error(runs.baseline[0], outcome[0]) for m, outcome in found.items()}


def errors_of(
    model: ir.Model,
    specs: Mapping[str, TensorSpec],
    blocks: Blocks,
    images: Images,
    *,
    threads: int = 0,
) -> tuple[Error, float | None]:
    """The error of the logits with all ``specs``, and the SNR of the features in dB."""
    runs = _Runs(model, threads, _last_norm(model, blocks))
    segments, values = runs.segments, images.values
    segments.run(values, 0, runs.last, {}, images.batch)
    truth = runs.measured(images)
    segments.run(values, 0, runs.last, specs, images.batch)
    error, features = _judged(truth, runs.measured(images))
    return error, None if features is None else decibels(features)


def _last_norm(model: ir.Model, blocks: Blocks) -> str | None:
    """The output of the norm behind the last block."""
    norms = [n for n in model.graph if n.op_type == "LayerNormalization"]
    last = norms[-1] if norms else None
    if last is None or blocks.roles[name_of(last)].name != "norm":
        return None
    return str(last.outputs[0].name)


def _judged(truth: Outcome, found: Outcome, answers: bool = True) -> Judged:
    """The error of the outputs, and the noise-to-signal ratio of the features; ``answers``: an
    output holds classes."""
    features: float | None = None
    if truth[1] is not None and found[1] is not None:
        sums = Sums()
        sums.add(truth[1], found[1])
        features = sums.snr
    error = outputs_error(truth[0], found[0])
    return error if answers else replace(error, agreement=None), features


def run_count(modules: Sequence[Module]) -> int:
    """The number of runs that both analyses take."""
    return len(modules) + sum(m.part == "all" or m.scope in APART for m in modules)


def _switched(module: Module, found: Judged, baseline: Judged | None) -> Switched:
    error, ratio = found
    before, ratio_before = (None, None) if baseline is None else baseline
    features = None if ratio is None else decibels(ratio)
    features_before = None if ratio_before is None else decibels(ratio_before)
    return Switched(
        module=module.name,
        scope=module.scope,
        role=module.role,
        block=module.block,
        part=module.part,
        tensors=len(module.tensors),
        error=error,
        features_db=features,
        gain_db=None if before is None else difference(error.snr_db, before.snr_db),
        features_gain_db=None
        if features is None or features_before is None
        else difference(features, features_before),
        features_snr=ratio,
    )


class _Runs:
    """Runs of one model in which the specs differ from a background in some tensors."""

    def __init__(
        self,
        model: ir.Model,
        threads: int,
        features: str | None,
        rounded: ir.Model | None = None,
    ) -> None:
        self.outputs = float_outputs(model)
        if not self.outputs:
            raise ModelError("The model has no output of floats to measure modules at.")
        self.segments = Segments(model, self.outputs, threads, features=features, rounded=rounded)
        self.last = len(self.segments.parts) - 1
        self.baseline: Outcome = (), None

    def measured(self, images: Images) -> Outcome:
        """Outputs and features of the run just made, without what only fills up a batch."""
        seen, count = self.segments.seen, len(images.values)
        ends = tuple(e[: images.real] if len(e) == count else e for e in self.segments.ends)
        return ends, None if seen is None else seen[: images.real]

    def each(
        self,
        background: Specs,
        variants: Mapping[Module, Specs],
        images: Images,
        progress: Callable[[int], None] | None,
    ) -> Iterator[tuple[Module, Outcome]]:
        """The outcome of every variant; ``baseline`` afterwards: that of the background."""
        places = self.segments.places()
        waiting: dict[int, list[list[Module]]] = defaultdict(list)
        ends: dict[Module, int] = {}
        same: dict[frozenset[str], list[Module]] = defaultdict(list)
        for module in variants:
            same[module.tensors].append(module)
        for tensors, group in same.items():
            touched = [places.get(t, 0) for t in tensors]
            waiting[min(touched)].append(group)
            ends[group[0]] = max(touched)
        value = images.values
        for number in range(self.last + 1):
            for group in sorted(waiting[number], key=lambda g: ends[g[0]]):
                end, specs = ends[group[0]], variants[group[0]]
                found = self.segments.run(value, number, end, specs, images.batch)
                if end < self.last:
                    found = self.segments.run(
                        found, end + 1, self.last, background, images.batch, "rest"
                    )
                if progress is not None:
                    progress(len(group))
                outcome = self.measured(images)
                yield from ((module, outcome) for module in group)
            value = self.segments.run(value, number, number, background, images.batch)
        self.baseline = self.measured(images)
