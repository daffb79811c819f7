"""Layerwise and leave-one-out analysis: which module costs what, at the logits.

Layerwise: one module is quantized, the rest float. Leave-one-out: all are quantized but what
``--keep-float`` leaves in float for one; what that gives back (see variants.py, and shards.py for
several processes).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.analysis.costliest import (
    Costs,
    costliest,
    count_of_costliest,
    images_of_first_run,
)
from ptq_onnx.analysis.decibels import decibels, difference
from ptq_onnx.analysis.errors import Sums, outputs_error
from ptq_onnx.analysis.modules import Module, find_modules
from ptq_onnx.analysis.results import Error, Sensitivity, Switched
from ptq_onnx.analysis.segments import Specs
from ptq_onnx.analysis.shards import Shards, Way
from ptq_onnx.analysis.variants import Images, Outcome, Runs
from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.calibration.class_output import class_outputs, feature_outputs
from ptq_onnx.errors import ModelError
from ptq_onnx.images.source import ImageSource
from ptq_onnx.numerics.spec import Site, TensorSpec

Array = NDArray[np.float32]
Judged = tuple[Error, float | None]
"""The error of the logits, and the noise-to-signal ratio of the features."""
APART = ("kind", "block", "model")
"""Scopes whose weights and activations leave-one-out also takes apart; layerwise does for all."""


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
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Sensitivity:
    """Both analyses of the float ``model`` with its ``specs``.

    All modules are measured on few of the images, spread evenly, and those that cost most on all
    of them (see costliest.py).

    ``reference``: the float model that ``model`` came from, where that is another: its weights
    not yet rounded, its biases not yet corrected. Its logits are compared with, and a linear
    whose weight a run leaves in float has its constants, not ``model``'s. ``apart``: weights and
    activations also by themselves. ``left_in_float``: the tensors that leave-one-out leaves in
    float for a module, where they are not its own alone. ``workers``: processes that make the runs;
    what they find does not depend on them. ``progress`` is called with the number of runs done, of
    :func:`run_count`. Raises ModelError where there is no image.
    """
    if not len(images.values):
        raise ModelError("There are no images to analyse the quantized model on.")
    started = time.perf_counter()
    modules = [m for m in find_modules(model, blocks, sites, specs) if apart or m.part == "all"]
    given = {m: m for m in modules if m.part == "all" or m.scope in APART}
    if left_in_float is not None:
        given |= {m: replace(m, tensors=left_in_float(m)) for m in given if m.part == "all"}
    features = _last_norm(model, blocks)
    rounded = None if reference is None else model
    answers = bool(set(class_outputs(model)) - set(feature_outputs(model)))

    def measured(on: Images, chosen: Sequence[Module]) -> _Found:
        """Both analyses of some of the modules."""
        way = Way(reference or model, features, rounded, on, threads, workers)
        judge = partial(_judged, way.runs().whole({}, on), answers=answers)
        alone = {m: {t: specs[t] for t in m.tensors} for m in chosen}
        taken = [m for m in chosen if m in given]
        but = {m: {t: s for t, s in specs.items() if t not in given[m].tensors} for m in taken}
        with Shards(way, judge) as shards:
            layerwise, _ = shards.each({}, alone, progress)
            left, baseline = shards.each(specs, but, progress)
        return _Found(layerwise, left, baseline, on.real)

    few = images_of_first_run(images.real)
    last = measured(images if few == images.real else images.spread(few), modules)
    found = dict.fromkeys(modules, last)
    if few < images.real:
        worst = costliest({m: last.costs(m) for m in modules if m.part == "all"})
        last = measured(images, worst)
        found |= dict.fromkeys(worst, last)
    error, ratio = last.baseline
    return Sensitivity(
        images=images.real,
        few_images=few,
        held_apart=held_apart,
        baseline=error,
        baseline_features_db=None if ratio is None else decibels(ratio),
        baseline_features_snr=ratio,
        layerwise=tuple(_switched(m, found[m].images, found[m].layerwise[m]) for m in modules),
        leave_one_out=tuple(
            _switched(taken, found[m].images, found[m].left[m], found[m].baseline)
            for m, taken in given.items()
        ),
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Found:
    """What both analyses say of modules, and of the model with everything quantized, on so many
    images."""

    layerwise: Mapping[Module, Judged]
    left: Mapping[Module, Judged]
    baseline: Judged
    images: int

    def costs(self, module: Module) -> Costs:
        """By which the costliest are found."""
        error, features = self.left[module]
        ratio = error.snr if features is None else features
        return self.layerwise[module][0].snr, ratio, error.snr


def layerwise_errors(
    model: ir.Model,
    alone: Mapping[Module, Specs],
    images: Images,
    *,
    threads: int = 0,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[Module, Error]:
    """The error of the logits with the specs of one module, the rest float, for each module.

    ``progress`` is called with the number of modules done.
    """
    with Shards(Way(model, None, None, images, threads, workers), _outputs) as shards:
        found, baseline = shards.each({}, alone, progress)
    return {m: outputs_error(baseline, outputs) for m, outputs in found.items()}


def errors_of(
    model: ir.Model,
    specs: Mapping[str, TensorSpec],
    blocks: Blocks,
    images: Images,
    *,
    threads: int = 0,
) -> tuple[Error, float | None]:
    """The error of the logits with all ``specs``, and the SNR of the features in dB."""
    runs = Runs(model, threads, _last_norm(model, blocks))
    error, features = _judged(runs.whole({}, images), runs.whole(specs, images))
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


def _outputs(found: Outcome) -> tuple[Array, ...]:
    return found[0]


def run_count(modules: Sequence[Module], images: int) -> int:
    """The number of runs that both analyses take."""
    both = sum(m.part == "all" or m.scope in APART for m in modules)
    again = 2 * count_of_costliest(modules) if images_of_first_run(images) < images else 0
    return len(modules) + both + again


def _switched(
    module: Module, images: int, found: Judged, baseline: Judged | None = None
) -> Switched:
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
        images=images,
        error=error,
        features_db=features,
        gain_db=None if before is None else difference(error.snr_db, before.snr_db),
        features_gain_db=None
        if features is None or features_before is None
        else difference(features, features_before),
        features_snr=ratio,
    )
