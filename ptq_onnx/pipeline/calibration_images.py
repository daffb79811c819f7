"""The images of a run, and their batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.images.opening import FolderSource, Images, Preprocess
from ptq_onnx.images.source import NOISE, ImageSource
from ptq_onnx.images.synthetic import DRAWN, PSAQ, SYNTHETIC, is_drawn
from ptq_onnx.pipeline.several_inputs import open_source, taken_by

ON_DRAWN = {
    NOISE: "Calibrated with Gaussian noise: its ranges are not those of pictures. Good for"
    " comparison, not for use.",
    SYNTHETIC: "Calibrated with pictures that were drawn, not taken: nearer to photographs than"
    " noise, but photographs are better.",
    PSAQ: "Calibrated with pictures that were made from the model, not taken: ranges found on them"
    " are worth less than those of photographs.",
}
FEW = 8
"""Calibration images below which a note says so."""


class Batches:
    """Batches of an image source that can be run over again.

    For a model that only takes batches of ``fixed`` images each image is a batch of its own, of
    so many ``copies``: then nothing but images counts, and each as often as any other.
    """

    def __init__(self, source: ImageSource, size: int, fixed: int | None = None) -> None:
        self.source, self.copies = source, fixed or 1
        self.size = size if fixed is None else 1

    def __iter__(self) -> Iterator[Any]:
        for batch in self.source.batches(self.size):
            yield batch if self.copies == 1 else np.repeat(batch, self.copies, axis=0)


def has_class_folders(source: ImageSource) -> bool:
    """Whether classes came with the images, or they lie in sub-folders, which then are theirs."""
    if source.labels is not None:
        return True
    folders = isinstance(source, FolderSource) and not source.listed
    return folders and all("/" in name for name in source.names)


def calibration_images(
    model: Path,
    calib: Images | None,
    preprocess: Preprocess,
    config: QuantizeConfig,
    notes: list[str],
    how: dict[str, Any],
) -> ImageSource:
    """The calibration images, or drawn ones; a note where either says little of real pictures.

    ``how``: keywords of :func:`open_images` besides the limit. Raises ImageError.
    """
    noise = is_drawn(calib)
    if noise:
        notes.append(ON_DRAWN[str(calib)])
        if taken_by(model).plain:
            drawn = DRAWN[str(calib)](preprocess, config.images)
            return drawn if config.seed is None else drawn.drawn(config.images, config.seed)
    found = open_source(model, calib, preprocess, config.input, config.images, **how)
    if config.seed is not None:
        found = found.drawn(config.images, config.seed)
        if not found.others(1):
            notes.append(
                f"--seed {config.seed} draws nothing: all {len(found)} images calibrate; give fewer"
                " with --images, or more to draw from."
            )
    if len(found) < FEW and not noise:
        images = "1 image" if len(found) == 1 else f"{len(found)} images"
        notes.append(
            f"Calibrated on {images} only, which hardly show a tensor's range, and closeness"
            " measured on the same ones says nothing: give 32 or more."
        )
    return found
