"""The preprocessing of timm's models, by timm's own table: no weights, and no network."""

from __future__ import annotations

import math
from typing import Any

from ptq_onnx.errors import ConfigError, one_line


def preprocessing_of(name: str) -> dict[str, Any]:
    """Options of the preprocessing that timm evaluates a model with. Raises ConfigError."""
    try:
        from timm.models import get_pretrained_cfg
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise ConfigError(
            f"timm: {name}: timm cannot be imported ({one_line(error)}): install timm and"
            " torchvision, or write mean, std, crop_pct and interpolation into the table."
        ) from error
    try:
        found = get_pretrained_cfg(name.removeprefix("timm/"))
    except RuntimeError:
        found = None
    if found is None:
        raise ConfigError(f"timm: {name}: timm has no such model; see timm.list_models().")
    options = {
        "mean": tuple(map(float, found.mean)),
        "std": tuple(map(float, found.std)),
        "crop_pct": min(float(found.crop_pct), 1.0),
        "interpolation": found.interpolation,
    }
    assert all(math.isfinite(v) for v in (*options["mean"], *options["std"]))
    return options
