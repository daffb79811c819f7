"""What says how a picture becomes a model input: a name, a file, an object or a function."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq_onnx.config.hugging_face import beside, from_processor, read_processor
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError
from ptq_onnx.images.opening import Transform
from ptq_onnx.images.preprocess import PREPROCESS_NAMES, Preprocess

Preprocessing = str | os.PathLike[str] | Preprocess | Transform
"""What functions take as ``preprocess``; a processor of transformers, too."""


@dataclass(frozen=True)
class Given:
    """A ``preprocess`` taken apart: at most one of the two is there."""

    values: Preprocess | None = None
    transform: Transform | None = None


def taken(preprocess: Any, config: QuantizeConfig) -> tuple[QuantizeConfig, Given]:
    """The config, with the names and files that it can hold, and all else. Raises ConfigError."""
    if preprocess is None:
        return config, Given()
    if isinstance(preprocess, str | os.PathLike):
        return config.merged(preprocess=os.fspath(preprocess)), Given()
    if isinstance(preprocess, Preprocess):
        return config, Given(values=preprocess)
    if hasattr(preprocess, "image_mean") and hasattr(preprocess, "to_dict"):
        kind = type(preprocess).__name__
        return config, Given(values=from_processor(preprocess.to_dict(), kind))
    if callable(preprocess):
        return config, Given(transform=preprocess)
    raise ConfigError(
        f"preprocess is a {type(preprocess).__name__}: expected one of"
        f" {', '.join(PREPROCESS_NAMES)}, a folder with a preprocessor_config.json, a Preprocess,"
        " or a function from a picture to an array [C, H, W]."
    )


def from_files(config: QuantizeConfig, model: Path | None) -> tuple[Preprocess, Path] | None:
    """The preprocessing of the file that the config names, else of one beside the model."""
    name = config.preprocess
    if name is not None:
        return None if name in PREPROCESS_NAMES else (read_processor(name), Path(name))
    found = None if model is None else beside(model)
    return None if found is None else (read_processor(found), found)
