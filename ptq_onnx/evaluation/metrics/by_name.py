"""The metrics by name; a function of the user's is imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from ptq_onnx.config.metric_options import metric_options
from ptq_onnx.evaluation.metrics.classification import Classification
from ptq_onnx.evaluation.metrics.dense import Depth, Segmentation
from ptq_onnx.evaluation.metrics.detection import Detection
from ptq_onnx.evaluation.metrics.features import Features
from ptq_onnx.evaluation.metrics.metric import Metric
from ptq_onnx.evaluation.metrics.own import Own
from ptq_onnx.evaluation.metrics.targets import Targets
from ptq_onnx.evaluation.metrics.text import Text
from ptq_onnx.images.source import ImageSource

METRICS: tuple[type[Metric], ...] = (
    Classification, Features, Segmentation, Detection, Depth, Text,
)  # fmt: skip
BY_CLASS = (Classification.name, Features.name)
"""Their targets may be called labels."""
CHARACTERS = "character"
"""The key of a model's metadata under which readers of text keep their dictionary."""


def make_metric(
    name: str | None,
    given: tuple[str, ...],
    images: ImageSource,
    model: Path,
    targets: str | Path | None = None,
    labels: str | Path | None = None,
) -> Metric | None:
    """The metric that the options name; None where they name none. ``model``: whose metadata may
    hold a dictionary; ``labels``: the targets of metrics of classes, where they have no others.
    Raises ConfigError, ImageError."""
    if name is None:
        return None
    options = metric_options(given)
    truth = None
    if targets is None and name in BY_CLASS:
        targets = labels
    if targets is not None:
        truth = Targets(Path(targets), list(images.names), images.preprocess)
    kind = next((kind for kind in METRICS if kind.name == name), None)
    more: dict[str, Any] = {}
    if kind is None:
        return Own(options, truth, called=name)
    if kind is Text:
        more["stored"] = _dictionary(model)
    if kind is Detection:
        more["input_size"] = images.preprocess.size
    return kind(options, truth, **more)


def _dictionary(model: Path) -> str | None:
    """The dictionary in a model's metadata."""
    found: Mapping[str, str] = {
        entry.key: entry.value
        for entry in onnx.load(model, load_external_data=False).metadata_props
    }
    return found.get(CHARACTERS)
