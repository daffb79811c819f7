"""What ``--metric`` and ``--metric-option`` may say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ptq_onnx.config.names import METRIC_NAMES
from ptq_onnx.config.option_types import shown
from ptq_onnx.errors import ConfigError


def check_metric(name: str | None, given: Sequence[str]) -> None:
    """Raises ConfigError for what is neither a metric nor ``module:function``, and for options
    without one."""
    if name is None:
        if given:
            raise ConfigError(
                f"--metric-option {shown(given[0])} belongs to a metric: add --metric NAME."
            )
        return
    own = re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", name)
    if name not in METRIC_NAMES and own is None:
        raise ConfigError(
            f"There is no metric {shown(name)}; choose one of {', '.join(METRIC_NAMES)}, or a"
            " function of your own as module:function."
        )
    metric_options(given)


def is_own(name: object) -> bool:
    """Whether a metric is a function of the user's, which is code."""
    return isinstance(name, str) and name not in METRIC_NAMES


def refuse_own(values: Mapping[str, Any], where: str) -> None:
    """No code is loaded for a file of options. Raises ConfigError."""
    if is_own(values.get("metric")):
        raise ConfigError(
            f"{where}: metric {shown(values['metric'])} is a function of your own, which is code:"
            " name it on the command line, with --metric."
        )


def metric_options(given: Sequence[str]) -> dict[str, str]:
    """``KEY=VALUE`` by key. Raises ConfigError."""
    found: dict[str, str] = {}
    for text in given:
        key, equals, value = str(text).partition("=")
        if not (key and equals and value):
            raise ConfigError(
                f"--metric-option {shown(text)}: expected KEY=VALUE, as in output=logits."
            )
        if found.setdefault(key, value) != value:
            raise ConfigError(f"--metric-option {key}: given twice, {found[key]} and {value}.")
    return found
