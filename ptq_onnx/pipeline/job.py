"""One quantization under way: what it was asked for and given, which no stage changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.sites import image_input
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.images.packed_source import PackedSource
from ptq_onnx.images.source import ImageSource
from ptq_onnx.pipeline.calibration_images import Batches
from ptq_onnx.pipeline.reading import Inputs
from ptq_onnx.pipeline.request import Request
from ptq_onnx.progress import Advance, Stages

if TYPE_CHECKING:
    from ptq_onnx.evaluation.metrics.metric import Metric
    from ptq_onnx.quantizers.base import SiteQuantizer


@dataclass(frozen=True)
class Job:
    """One quantization, whose files go to ``work``. A stage reads it and returns what it made;
    it may add to ``notes``, which are told to the user, and tell ``progress``."""

    request: Request
    inputs: Inputs
    work: Path
    progress: Stages
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> QuantizeConfig:
        """The options as they were given; what was decided of them is the plan's config."""
        return self.request.config

    @property
    def fixed(self) -> int | None:
        """The model's batch size where it is fixed and written into its graph."""
        shape = image_input(self.inputs.prepared.model).shape
        return shape[0] if shape is not None and isinstance(shape[0], int) else None

    def batches(self, source: ImageSource | None = None, size: int | None = None) -> Batches:
        """Batches of the size that config or model ask for, of the calibration images where no
        others are given."""
        images = self.inputs.images if source is None else source
        return Batches(images, size or self.config.batch, self.fixed)

    def calibrate(self, quantizer: SiteQuantizer, images: ImageSource) -> None:
        """Give a quantizer its numbers, from these images or from those that it has."""
        from ptq_onnx.engine.simulator import inputs_of, tensors_of

        example = np.zeros((self.fixed or 1, *self.inputs.preprocess.shape), np.float32)
        if isinstance(images, PackedSource):
            example = np.repeat(next(images.batches(1)), self.fixed or 1, axis=0)
        graph = inputs_of(self.inputs.prepared.model)
        quantizer.run(tensors_of(graph, example), self.batches(images))

    def stage(self, name: str, total: int | None = None, runs: int = 1) -> Advance:
        """Begin a stage: of the calibration images, run so many times, where no total is given."""
        return self.progress(name, runs * len(self.inputs.images) if total is None else total)

    def metric(self, images: ImageSource) -> Metric | None:
        """What images are measured by besides closeness; None where nothing was named."""
        from ptq_onnx.evaluation.metrics.by_name import make_metric

        config, path = self.config, self.inputs.prepared.path
        given = self.request.targets, self.request.labels
        return make_metric(config.metric, config.metric_option, images, path, *given)

    def as_taken(self, model: ir.Model) -> ir.Model:
        """The model with the batch size that the file was given with."""
        fixed = self.inputs.prepared.fixed
        return model if fixed is None else fixed.restore(model)

    @cached_property
    def held_apart(self) -> tuple[ImageSource, bool]:
        """Images of the analysis, and whether calibration did not see them: the others of its
        folder, else those of ``--val``, else, with a note, its own."""
        limit, images = self.config.analysed, self.inputs.images
        if not self.request.calibrated:
            return images.reopened(limit), True
        others = images.others(limit)
        if others is not None:
            return others, True
        if self.inputs.tested is not None:
            return self.inputs.tested.reopened(limit), True
        self.notes.append(
            "All images were used for calibration, so the analysis runs on some of the same;"
            " give more images than --images, or --val, to hold some out."
        )
        return images.reopened(limit), False
