"""``preprocessor_config.json`` of Hugging Face's image processors, as a :class:`Preprocess`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptq_onnx.config.option_types import shown
from ptq_onnx.errors import ConfigError
from ptq_onnx.files.text_file import read_text
from ptq_onnx.images.preprocess import Interpolation, Preprocess

FILE = "preprocessor_config.json"
LARGEST = 1 << 18
"""Bytes of such a file; they have some hundred."""
RESAMPLE: Mapping[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters that we have."""
UNKNOWN = ("rescale_offset", "include_top", "do_pad", "do_flip_channel_order")
"""Steps that ours has not."""
SMALL_CONVNEXT = 384
"""Below it ConvNeXT's processor crops, from it on it squeezes."""


def beside(model: Path) -> Path | None:
    """The file next to a model, or one folder up from it where the folder is called ``onnx``."""
    folders = [model.parent, *([model.parent.parent] if model.parent.name == "onnx" else [])]
    return next((f / FILE for f in folders if (f / FILE).is_file()), None)


def read_processor(path: str | Path) -> Preprocess:
    """From the file, or from a folder that holds one. Raises ConfigError."""
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    try:
        values = json.loads(read_text(file, LARGEST))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"Preprocessing: {file} cannot be read: {reason}.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"Preprocessing: {file} is not JSON ({error}).") from None
    if not isinstance(values, dict):
        raise ConfigError(f"Preprocessing: {file} holds no object, but {shown(values)}.")
    try:
        return from_processor(values, str(file))
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        # numbers of another kind than processors write: {"size": {"height": "x"}}
        raise ConfigError(f"Preprocessing: {file} has an invalid value: {error}.") from None


def from_processor(values: Mapping[str, Any], where: str) -> Preprocess:
    """From a processor's settings: resize, crop, rescale, normalise. Raises ConfigError."""
    if not {"image_mean", "do_normalize", "size"} & set(values):
        raise ConfigError(
            f"Preprocessing: {where} has neither image_mean nor size; expected the {FILE} of an"
            " image model."
        )
    other = next((name for name in UNKNOWN if values.get(name)), None)
    if other is not None:
        raise ConfigError(
            f"Preprocessing: {where}: {other} is not known here: give a function of your own as"
            " preprocess=, or arrays."
        )
    try:
        size, crop_pct, squash = _geometry(values, where)
        mean, std = _normalisation(values, where)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(
            f"Preprocessing: {where}: expected numbers that are not zero ({error})."
        ) from None
    code = values.get("resample", 2)
    if not isinstance(code, int) or code not in RESAMPLE:
        known = ", ".join(f"{number} ({name})" for number, name in RESAMPLE.items())
        raise ConfigError(f"Preprocessing: {where}: resample {shown(code)} is none of {known}.")
    return Preprocess(
        mean=mean,
        std=std,
        size=size,
        crop_pct=crop_pct,
        interpolation=RESAMPLE[code],
        channels=len(mean),
        squash=squash,
    )


def _geometry(values: Mapping[str, Any], where: str) -> tuple[tuple[int, int], float, bool]:
    """Size, the part of the resized picture that is kept, and whether sides are squeezed."""
    size = values.get("size", 224)
    if "ConvNext" in str(
        values.get("image_processor_type") or values.get("feature_extractor_type")
    ):
        edge = _edge(size)
        if edge is not None and edge < SMALL_CONVNEXT:
            return (edge, edge), float(values.get("crop_pct") or 0.875), False
        if edge is not None:
            return (edge, edge), 1.0, True
    if values.get("do_center_crop") and values.get("crop_size") is not None:
        crop, edge, whole = _sides(values["crop_size"]), _edge(size), _sides(size)
        if crop is not None and edge is not None:
            return crop, _part(min(crop), edge), False
        if crop is not None and whole is not None and crop[0] * whole[1] == crop[1] * whole[0]:
            return crop, _part(crop[0], whole[0]), True
    sides = _sides(size)
    if sides is not None:
        return sides, 1.0, True
    edge = _edge(size)
    if edge is not None:
        return (edge, edge), 1.0, False
    raise ConfigError(
        f"Preprocessing: {where}: size {size!r:.80} is not known here (height and width, or"
        " shortest_edge): give a function of your own as preprocess=, or arrays."
    )


def _part(crop: int, edge: int) -> float:
    """crop/edge, such that ⌊crop / part⌋ is the edge."""
    part = min(1.0, crop / edge)
    return part if math.floor(crop / part) == edge else crop / (edge + 1e-6)


def _edge(size: Any) -> int | None:
    """The shorter side that is asked for, where the longer follows from the picture."""
    if isinstance(size, Mapping) and "shortest_edge" in size and "longest_edge" not in size:
        return int(size["shortest_edge"])
    return None


def _sides(size: Any) -> tuple[int, int] | None:
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return int(size["height"]), int(size["width"])
    if isinstance(size, int) and not isinstance(size, bool):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _normalisation(
    values: Mapping[str, Any], where: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std on the scale 0 to 1 of (x·factor − mean) / std, x in 0 to 255."""
    factor = float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else 1.0
    if values.get("do_normalize", True):
        mean, std = values.get("image_mean"), values.get("image_std")
        if not isinstance(mean, list | tuple) or not isinstance(std, list | tuple):
            raise ConfigError(f"Preprocessing: {where}: image_mean and image_std are missing.")
    else:
        mean, std = (0.0,) * 3, (1.0,) * 3
    scale = 255 * factor
    if scale == 1:  # the usual case, to the last bit
        return tuple(mean), tuple(std)
    return tuple(m / scale for m in mean), tuple(s / scale for s in std)
