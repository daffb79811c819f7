"""One quantization under way: what it works on, and what its stages share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ptq_onnx.blocks.sites import image_input
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.evaluation.parity import Parity
from ptq_onnx.images.opening import Preprocess
from ptq_onnx.images.source import ImageSource
from ptq_onnx.pipeline.calibration_images import Batches
from ptq_onnx.preparation.prepare import Prepared
from ptq_onnx.progress import Advance, Stages
from ptq_onnx.report.reproduce import Invocation

if TYPE_CHECKING:
    from ptq_onnx.analysis.results import Analysis
    from ptq_onnx.equalization.rotation_choice import Turns
    from ptq_onnx.quantizers.base import SiteQuantizer


@dataclass
class Job:
    """One quantization, stage by stage; files go to ``work``."""

    prepared: Prepared
    config: QuantizeConfig
    preprocess: Preprocess
    images: ImageSource
    notes: list[str]
    work: Path
    progress: Stages
    analysis: Analysis | None = None
    original: Prepared | None = None
    """The model before equalisation, where there is any."""
    picture: Path | None = None
    """The image whose attention is drawn, as the model sees it."""
    validation: dict[str, Any] | None = None
    """Names of the folder measured on and of its labels."""
    invocation: Invocation | None = None
    """The paths that the run was given."""
    labels: str | Path | None = None
    apart: tuple[ImageSource, bool] | None = None
    """Images of the analysis, once they were chosen, and whether calibration did not see them."""
    again: Callable[[], Prepared] | None = None
    """Prepares the model anew: equalisation changes it in place."""
    turns: Turns | None = None
    """What rotation turned, and by what."""
    parity: Parity | None = None
    """How far the rewritten model is off the original."""

    @property
    def fixed(self) -> int | None:
        """The model's batch size where it is fixed and written into its graph."""
        shape = image_input(self.prepared.model).shape
        return shape[0] if shape is not None and isinstance(shape[0], int) else None

    def batches(self, source: ImageSource, size: int | None = None) -> Batches:
        """Batches of the size that config or model ask for."""
        return Batches(source, size or self.config.batch, self.fixed)

    def calibrate(self, quantizer: SiteQuantizer, images: ImageSource) -> None:
        """Give a quantizer its numbers, from these images or from those that it has."""
        import torch

        quantizer.run(torch.zeros(self.fixed or 1, *self.preprocess.shape), self.batches(images))

    def stage(self, name: str, total: int | None = None, runs: int = 1) -> Advance:
        """Begin a stage: of the calibration images, run so many times, where no total is given."""
        return self.progress(name, runs * len(self.images) if total is None else total)

    def as_taken(self, model: ir.Model) -> ir.Model:
        """The model with the batch size that the file was given with."""
        fixed = self.prepared.fixed
        return model if fixed is None else fixed.restore(model)

    def held_apart(self, tested: ImageSource | None) -> tuple[ImageSource, bool]:
        """Images that calibration did not see: the folder's others, else ``--val``'s."""
        if self.apart is None:
            self.apart = self._choose_apart(tested)
        return self.apart

    def _choose_apart(self, tested: ImageSource | None) -> tuple[ImageSource, bool]:
        limit = self.config.analysis_images
        others = self.images.others(limit)
        if others is not None:
            return others, True
        if tested is not None:
            return tested.reopened(limit), True
        self.notes.append(
            "All images were used for calibration, so the analysis runs on some of the same;"
            " give more images than --images, or --val, to hold some apart."
        )
        return self.images.reopened(limit), False
