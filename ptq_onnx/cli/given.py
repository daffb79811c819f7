"""What a user has given, from the command line and a file, as one config."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ptq_onnx.cli.options import FIELDS, PATHS
from ptq_onnx.config.metric_options import refuse_own
from ptq_onnx.config.option_file import read_yaml
from ptq_onnx.config.option_types import shown
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError


def settings(
    config: str | None, given: Mapping[str, Any], **defaults: Any
) -> tuple[QuantizeConfig, dict[str, Any]]:
    """The config, and the path options: the YAML file's, overruled by what is ``given``.

    ``defaults``: those of a command, where neither says anything. ``given`` may hold more than
    options, and None for options that were not used. Raises ConfigError.
    """
    read = {} if config is None else read_yaml(config)
    refuse_own(read, f"Config {config}")
    values = defaults | read
    values.update((k, v) for k, v in given.items() if k in (*FIELDS, *PATHS) and v is not None)
    paths = {k: v for k in PATHS if (v := values.pop(k, None)) is not None}
    for name, path in paths.items():
        if not isinstance(path, str) or not path or "\0" in path:
            raise ConfigError(f"--{name} {shown(path)}: must be the name of a file or folder.")
    for name, parse in PARSERS.items():
        if isinstance(values.get(name), str | int | float):
            values[name] = parse(name, str(values[name]))
    return QuantizeConfig.from_mapping(values, str(config or "options")), paths


def _numbers(name: str, text: str) -> tuple[float, ...]:
    """``0.5,0.5,0.5``. Raises ConfigError."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
        if all(map(math.isfinite, numbers)):
            return numbers
        raise ValueError
    except ValueError:
        raise ConfigError(f"--{name} {shown(text)}: expected numbers, as in 0.5,0.5,0.5.") from None


def _sides(name: str, text: str) -> tuple[int, int]:
    """``224`` or ``224x192``, height first. Raises ConfigError."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(re.fullmatch("0*[1-9][0-9]{0,4}", side) for side in sides):
        raise ConfigError(f"--{name} {shown(text)}: expected pixels, as in 224 or 224x192.")
    return int(sides[0]), int(sides[-1])


def _one(_: str, text: str) -> tuple[str, ...]:
    return (text,)


PARSERS: dict[str, Callable[[str, str], tuple[Any, ...]]] = {
    "mean": _numbers,
    "std": _numbers,
    "size": _sides,
    "keep_float": _one,
    "more_bits": _one,
    "per_channel": _one,
    "metric_option": _one,
    "input": _one,
}
"""Options whose text is not their value yet."""
