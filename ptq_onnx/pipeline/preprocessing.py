"""The preprocessing of a run: by options, by the model, or by a file beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.sites import image_input
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, ModelError
from ptq_onnx.images.opening import METADATA_KEY, Preprocess
from ptq_onnx.images.packed_source import NO_PICTURE
from ptq_onnx.pipeline.preprocess_input import Given, from_files
from ptq_onnx.preparation.prepare import Prepared, read_input
from ptq_onnx.preparation.signature import as_pixels, pixels, signature
from ptq_onnx.preparation.validation import is_image


def preprocess_notes(prepared: Prepared, config: QuantizeConfig, given: Given) -> list[str]:
    """What of the preprocessing is not written in the options."""
    if given.transform is not None:
        return [
            "Pictures went through your own preprocessing function, which the files do not record."
            " Give the same one to evaluate and compare."
        ]
    stored = METADATA_KEY in prepared.model.metadata_props
    found = None if stored or given.values else from_files(config, prepared.path)
    if found is None or config.preprocess is not None:
        return []
    return [f"Preprocessing as in {found[1]}, which lies beside the model."]


def resolve_preprocess(
    model: str | Path | ir.Model,
    config: QuantizeConfig,
    given: Given | None = None,
    path: Path | None = None,
) -> Preprocess:
    """Preprocessing by the options, else by the model's metadata, else by a
    ``preprocessor_config.json`` beside its file ``path``, else by its first ops (a graph that
    normalises pixels itself gets pixels), else imagenet's.

    Size and channels come from the model's input where it states them, or from what fixes them
    in its graph. Raises ConfigError where option and model contradict each other.
    """
    if not isinstance(model, ir.Model):
        path = Path(model)
        model = read_input(model, config.size)
    if not is_image(image_input(model)):
        return NO_PICTURE
    shape = image_input(model).shape
    sides = [] if shape is None else [d if isinstance(d, int) else None for d in shape]
    if len(sides) != 4:
        raise ModelError("The model's input is not a batch of images [batch, channels, H, W].")
    channels, height, width = sides[1:]
    stored = model.metadata_props.get(METADATA_KEY)
    found = from_files(config, path if stored is None else None)
    if given is not None and given.values is not None:
        base = given.values
    elif found is not None:
        base = found[0]
    elif config.preprocess is None and stored is not None:
        base = Preprocess.from_json(stored)
    else:
        base = _by_first_ops(model, config)
    size = config.size or (base.size if height is None or width is None else (height, width))
    if height is not None and width is not None and tuple(size) != (height, width):
        raise ConfigError(
            f"--size {size[0]}x{size[1]}: the model takes {height}x{width} images only."
        )
    mean, std = config.mean or base.mean, config.std or base.std
    if channels == 1 and len(mean) == 3:
        mean, std = (float(np.mean(mean)),), (float(np.mean(std)),)
    if channels not in (None, 1, 3):
        raise ModelError(f"The model's input has {channels} channels; images have 1 or 3.")
    changes: dict[str, Any] = {"mean": mean, "std": std, "size": tuple(size)}
    if channels is not None:
        changes["channels"] = channels
    own = signature(model)
    if own is not None:
        changes["channels_last"] = own.channels_last
    if config.crop_pct is not None:
        changes["crop_pct"] = config.crop_pct
    if config.interpolation is not None:
        changes["interpolation"] = config.interpolation
    return as_pixels(model, config, replace(base, **changes))


def _by_first_ops(model: ir.Model, config: QuantizeConfig) -> Preprocess:
    """The preprocessing that options name, or that the graph leaves to be done."""
    if config.preprocess is not None:
        return Preprocess.named(config.preprocess)
    top = pixels(model)
    if top == 1:
        return replace(Preprocess.named("none"), mean=(0.0,) * 3, std=(1.0,) * 3)
    return Preprocess.named("imagenet" if top is None else "none")
