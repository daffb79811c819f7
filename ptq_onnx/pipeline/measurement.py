"""What the report says of the files in their runtime: accuracy, and closeness at every output."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.config.stages import MEASURING
from ptq_onnx.evaluation.evaluate import Evaluation, evaluate, since
from ptq_onnx.evaluation.metrics.metric import Metric
from ptq_onnx.evaluation.outputs import OutputFigures, decibels
from ptq_onnx.evaluation.recorded import Record
from ptq_onnx.images.source import ImageSource

BATCH = 8
NAMES = ("The quantized model", "The float model")
"""What errors call the two files: where they lie while they are measured is no one's business."""


def measured(
    quantized: Path,
    reference: Path,
    images: ImageSource,
    truth: NDArray[np.int64] | None,
    kind: str,
    *,
    threads: int,
    workers: int = 1,
    features: Collection[str] = (),
    stage: Callable[[str, int], Callable[[int], Any]],
    metric: Metric | None = None,
    floats: Path | None = None,
    kept: Record | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """``accuracy`` (None without labels), ``metric`` (None without one) and ``fidelity`` of the
    report, and notes.

    ``kind``: which images these are: ``val``, ``held apart`` from calibration, or of the
    ``calibration`` itself. ``features``: outputs that are no classes. ``floats``: where the float
    model's outputs on these images are kept for other runs; ``kept``: the quantized model's, where
    both have been run in parts. Raises PtqError.
    """
    record = None
    if floats is not None:
        record = Record.of(floats, reference, images.preprocess, BATCH, threads)
    found = evaluate(
        quantized,
        images,
        truth,
        threads=threads,
        workers=workers,
        reference=reference,
        progress=since(stage(MEASURING, len(images))),
        names=NAMES,
        features=features,
        baseline=True,
        metric=metric,
        batch_size=BATCH,
        record=record,
        kept=kept,
    )
    fidelity: dict[str, Any] = {
        "images": found.count,
        "source": kind,
        "sqnr_db": _number(decibels(found.sqnr_db)),
        "agreement": found.agreement,
        "outputs": [_closeness(one) for one in found.outputs],
    }
    plain = found.baseline
    metric_found = None if found.score is None else asdict(found.score)
    result: dict[str, Any] = {"accuracy": None, "fidelity": fidelity, "metric": metric_found}
    if plain is None:
        return result, found.notes
    by_name = {one.name: one for one in found.outputs}
    answers = [one for one in plain.outputs if one.top1 is not None and one.name in by_name]
    fidelity["agreement"] = by_name[str(plain.main)].agreement
    return result | {"accuracy": _accuracy(found, plain, answers, by_name)}, found.notes


def _accuracy(
    found: Evaluation,
    plain: Evaluation,
    answers: list[OutputFigures],
    by_name: Mapping[str, OutputFigures],
) -> dict[str, Any]:
    """Of the output that answers best in float; of each by itself where several do."""
    main = by_name[str(plain.main)]
    return {
        "count": found.count,
        "output": plain.main,
        "float": {"top1": plain.top1, "top5": plain.top5},
        "quantized": {
            "top1": main.top1,
            "top5": main.top5,
            "sqnr_db": main.sqnr_db,
            "agreement": main.agreement,
        },
        "outputs": [
            {
                "name": one.name,
                "float": {"top1": one.top1, "top5": one.top5},
                "quantized": {"top1": by_name[one.name].top1, "top5": by_name[one.name].top5},
            }
            for one in answers
        ],
    }


def _closeness(one: OutputFigures) -> dict[str, Any]:
    """Plain values, without what accuracy says."""
    values = asdict(one)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k[:3] != "top"}


def _number(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return None if value is None or math.isnan(value) else value
