"""Layerwise and leave-one-out analysis: which module costs what, at the logits.

Layerwise: one module is quantized, the rest float. Leave-one-out: all are quantized but one;
what it gives back. A run starts at the graph segment that holds the module, from activations
that all runs share, and ends in a session that all runs share (see segments.py). Memory holds
the images, one activation per image, and the weights of a few sessions.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.analysis.errors import logits_error
from ptq_onnx.analysis.modules import Module, find_modules
from ptq_onnx.analysis.results import Error, Sensitivity, Switched
from ptq_onnx.analysis.segments import Segments, Specs
from ptq_onnx.blocks import Blocks
from ptq_onnx.errors import ModelError
from ptq_onnx.spec import Site, TensorSpec

Array = NDArray[np.float32]
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


def sensitivity(
    model: ir.Model,
    specs: Mapping[str, TensorSpec],
    blocks: Blocks,
    sites: Mapping[str, Site],
    images: Images,
    *,
    held_apart: bool,
    reference: ir.Model | None = None,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Sensitivity:
    """Both analyses of the float ``model`` with its ``specs``, on all ``images``.

    ``reference``: the float model whose logits are compared with, where that is not ``model``
    (an equalised copy). ``progress`` is called with the number of runs done, of
    :func:`run_count`. Raises ModelError where there is no image.
    """
    if not len(images.values):
        raise ModelError("There are no images to analyse the quantized model on.")
    started = time.perf_counter()
    modules = find_modules(model, blocks, sites, specs)
    whole = _Runs(reference or model, threads)
    truth = whole.segments.run(images.values, 0, whole.last, {}, images.batch)
    alone = {m: {t: specs[t] for t in m.tensors} for m in modules}
    layerwise = {
        module: logits_error(truth[: images.real], found[: images.real])
        for module, found in _Runs(model, threads).each({}, alone, images, progress)
    }
    but = {
        m: {t: spec for t, spec in specs.items() if t not in m.tensors}
        for m in modules
        if m.part == "all" or m.scope in APART
    }
    runs = _Runs(model, threads)
    left = {
        module: logits_error(truth[: images.real], found[: images.real])
        for module, found in runs.each(specs, but, images, progress)
    }
    baseline = logits_error(truth[: images.real], runs.baseline[: images.real])
    return Sensitivity(
        images=images.real,
        held_apart=held_apart,
        baseline=baseline,
        layerwise=tuple(_switched(m, layerwise[m], None) for m in alone),
        leave_one_out=tuple(_switched(m, left[m], left[m].snr_db - baseline.snr_db) for m in but),
        seconds=time.perf_counter() - started,
    )


def run_count(modules: Sequence[Module]) -> int:
    """The number of runs that both analyses take."""
    return len(modules) + sum(m.part == "all" or m.scope in APART for m in modules)


def _switched(module: Module, error: Error, gain: float | None) -> Switched:
    return Switched(
        module=module.name,
        scope=module.scope,
        role=module.role,
        block=module.block,
        part=module.part,
        tensors=len(module.tensors),
        error=error,
        gain_db=gain,
    )


class _Runs:
    """Runs of one model in which the specs differ from a background in some tensors."""

    def __init__(self, model: ir.Model, threads: int) -> None:
        self.output = str(model.graph.outputs[0].name)
        self.segments = Segments(model, self.output, threads)
        self.last = len(self.segments.parts) - 1
        self.baseline: Array = np.zeros(0, np.float32)

    def each(
        self,
        background: Specs,
        variants: Mapping[Module, Specs],
        images: Images,
        progress: Callable[[int], None] | None,
    ) -> Iterator[tuple[Module, Array]]:
        """The logits of every variant; ``baseline`` afterwards: those of the background."""
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
                yield from ((module, found) for module in group)
            value = self.segments.run(value, number, number, background, images.batch)
        self.baseline = value
