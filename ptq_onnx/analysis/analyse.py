"""Runs the analyses that a config asks for, on images that calibration did not see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from ptq_onnx.analysis.advice import advise
from ptq_onnx.analysis.attention_values import attention_values
from ptq_onnx.analysis.graphwise import graphwise
from ptq_onnx.analysis.modules import find_modules, left_in_float
from ptq_onnx.analysis.results import Analysis, Graphwise, Sensitivity
from ptq_onnx.analysis.sensitivity import load, run_count, sensitivity
from ptq_onnx.analysis.variation import variation
from ptq_onnx.analysis.variation_results import Variation
from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.calibration.class_output import float_outputs
from ptq_onnx.config import stages
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.images.source import ImageSource
from ptq_onnx.numerics.spec import Site
from ptq_onnx.quantizers.base import SiteQuantizer

VARIATION_IMAGES = 16
ATTENTION_IMAGES = 4
"""Images of those parts, at most: they read every value of every tensor."""
SMALL = 2
"""Images at once where every tensor of the graph is held."""

Stage = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Subject:
    """What is analysed: the quantized model, and the float model to compare it with.

    ``model`` is the float model that ``quantizer`` quantized; ``reference`` the one it came
    from, where that is another: the same tensors, with weights not yet rounded and biases not
    yet corrected. What rounding changed is an error, and compared with the reference.
    """

    model: ir.Model
    quantizer: SiteQuantizer
    blocks: Blocks
    sites: Mapping[str, Site]
    simulator: Simulator
    reference: ir.Model | None = None

    @property
    def other(self) -> ir.Model | None:
        """The reference where it is not the model itself."""
        return None if self.reference is self.model else self.reference


def analyse_quantized(
    subject: Subject,
    source: ImageSource,
    *,
    held_apart: bool,
    full: bool,
    fixed: int | None = None,
    batch: int = 8,
    threads: int = 0,
    workers: int = 1,
    stage: Stage | None = None,
) -> Analysis:
    """Graphwise errors, variation and attention of all images; ``full``: layerwise and
    leave-one-out too, which takes minutes.

    ``fixed``: the model's batch size where it is fixed. ``workers``: processes for what takes
    minutes. Raises ModelError without images.
    """
    begin = stage or (lambda _, __: lambda ___: None)
    specs = subject.quantizer.specs
    way = _Way(source, fixed, threads, workers, begin)
    floats = Simulator(subject.other or subject.model, None, threads=threads)
    ops = _every_op(subject, way, floats, held_apart)
    varied = _variation(subject, way)
    looked = attention_values(
        subject.model,
        subject.blocks,
        floats,
        subject.simulator,
        named(source, SMALL, fixed, ATTENTION_IMAGES),
        specs,
        begin(stages.ATTENTION, min(ATTENTION_IMAGES, len(source))),
    )
    switched = None
    if full and float_outputs(subject.model):
        switched = _switched(subject, way, batch, held_apart)
    config = subject.quantizer.plan.config
    advice = advise(config, subject.sites, specs, varied, switched, looked)
    return Analysis(ops, switched, varied, looked, advice)


@dataclass(frozen=True)
class _Way:
    """The images of an analysis, and how they are run."""

    source: ImageSource
    fixed: int | None
    threads: int
    workers: int
    begin: Stage


def _every_op(subject: Subject, way: _Way, floats: Simulator, held_apart: bool) -> Graphwise:
    """The error of every op, against the simulator of the float model compared with."""
    count = len(way.source)
    return graphwise(
        subject.model,
        subject.quantizer,
        subject.blocks,
        _Filled(way.source, SMALL, way.fixed),
        held_apart=held_apart,
        sites=subject.sites,
        simulator=subject.simulator,
        reference=floats,
        count=count,
        threads=way.threads,
        progress=way.begin(stages.EVERY_OP, count),
    )


def _variation(subject: Subject, way: _Way) -> Variation:
    """Ranges, histograms and rounding, on few images."""
    few = min(VARIATION_IMAGES, len(way.source))
    return variation(
        subject.other or subject.model,
        subject.blocks,
        subject.sites,
        subject.quantizer.specs,
        _Filled(way.source, SMALL, way.fixed, few),
        rounded=subject.model,
        count=few,
        threads=way.threads,
        progress=way.begin(stages.VARIATION, 2 * few),
    )


def _switched(subject: Subject, way: _Way, batch: int, held_apart: bool) -> Sensitivity:
    """Every module quantized alone, and left in float alone."""
    specs = subject.quantizer.specs
    modules = find_modules(subject.model, subject.blocks, subject.sites, specs)
    return sensitivity(
        subject.model,
        specs,
        subject.blocks,
        subject.sites,
        load(way.source, way.fixed, batch),
        held_apart=held_apart,
        reference=subject.other,
        left_in_float=partial(left_in_float, quantizer=subject.quantizer),
        threads=way.threads,
        workers=way.workers,
        progress=way.begin(stages.MODULES, run_count(modules, len(way.source))),
    )


def named(
    source: ImageSource, size: int, fixed: int | None, limit: int | None = None
) -> Iterable[tuple[list[str], Any]]:
    """Names and batches of at most ``limit`` images; of a model with a ``fixed`` batch size each
    image is a batch of its own, of so many copies."""
    done = 0
    for names, batch in source.named_batches(size if fixed is None else 1):
        if limit is not None and done >= limit:
            return
        if limit is not None:
            names, batch = names[: limit - done], batch[: limit - done]
        done += len(names)
        yield names, batch if fixed is None else np.repeat(batch, fixed, axis=0)


class _Filled:
    """The batches of :func:`named`, to be run over again."""

    def __init__(
        self, source: ImageSource, size: int, fixed: int | None, limit: int | None = None
    ) -> None:
        self.source, self.size, self.fixed, self.limit = source, size, fixed, limit

    def __iter__(self) -> Any:
        return (b for _, b in named(self.source, self.size, self.fixed, self.limit))
