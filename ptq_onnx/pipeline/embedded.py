"""The model and the images that come with the source: what may be calibrated without --calib."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ptq_onnx.errors import ConfigError
from ptq_onnx.pipeline.model_path import find_model

IMAGES = Path(__file__).resolve().parents[2] / "img" / "digits" / "calib"
"""Calibration images of the embedded model: in the source, not in the wheel."""
MODEL_SHA256 = "4804253200e05d222924731bf779963ea3f891f91797dfb803942fc8b4cafc1f"
"""Of ``models/digits_vit.onnx``, wherever a copy of it lies."""


def is_embedded(model: str | Path) -> bool:
    """Whether a file is the embedded model, by its content."""
    path = Path(model)
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == MODEL_SHA256


def images_for(model: str | Path) -> Path:
    """The calibration images of a model for which none were named. Raises ConfigError for any
    but the embedded one, ModelError where there is none."""
    if not is_embedded(find_model(model)):
        raise ConfigError(
            f"Model {model} needs calibration images: --calib with a folder, .npy or .npz of some"
            " 128 pictures like those that it will see (only models/digits_vit.onnx brings its"
            " own)."
        )
    if not IMAGES.is_dir():
        raise ConfigError(
            "The images of the embedded model come with the source, not with the installed"
            " package: name calibration images with --calib."
        )
    return IMAGES
