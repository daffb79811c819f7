"""What ``--metric`` and ``--metric-option`` may say."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
