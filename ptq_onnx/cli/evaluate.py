"""The command ``ptq-onnx evaluate``: what a model is worth on images."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq_onnx.cli import options as o
from ptq_onnx.cli.console import decibels, outputs_table, percent, progress_bars, simple_table
from ptq_onnx.cli.given import settings
from ptq_onnx.cli.npu import WORDS, Npu, npu_of
from ptq_onnx.cli.terminal import stdout
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.evaluation.outputs import decibels as in_json
from ptq_onnx.pipeline.model_path import find_model
from ptq_onnx.progress import Progress
from ptq_onnx.report.page_text import metric_text, number, truth_text

if TYPE_CHECKING:
    from ptq_onnx.evaluation.evaluate import Evaluation
    from ptq_onnx.evaluation.metrics.metric import Score
    from ptq_onnx.images.source import ImageSource


@o.takes(*o.PICTURES, *o.METRIC, "batch", "threads", "workers", "device")
def evaluate(
    model: o.Model,
    val: o.Measured = None,
    labels: o.Labels = None,
    targets: o.Targets = None,
    reference: o.Reference = None,
    runtime: o.Runtime = "onnxruntime",
    soc: o.Soc = None,
    htp_arch: o.HtpArch = None,
    context: o.Context = None,
    as_json: o.Json = False,
    config: o.Config = None,
    **given: Any,
) -> None:
    """Measure top-1 and top-5 of a model in ONNX Runtime, or on Qualcomm's NPU."""
    options, paths = settings(config, locals() | given)
    path = find_model(model, written=True)
    from ptq_onnx.runtime.devices import on_device

    npu = npu_of(runtime, soc, htp_arch, context)
    other = None if reference is None else find_model(reference)
    if "val" not in paths:
        raise ConfigError("evaluate needs images: --val DIR.")
    with on_device(options.device), progress_bars() as progress:
        source, found = _measured(path, other, npu, options, paths, progress)
    if npu is not None:
        print(WORDS, file=sys.stderr)
    if as_json:
        _print_json(path, source, found)
    else:
        _print_table(path, source, found, compared=other is not None)


def _measured(
    path: Path,
    other: Path | None,
    npu: Npu | None,
    options: QuantizeConfig,
    paths: Mapping[str, Any],
    progress: Progress | None,
) -> tuple[ImageSource, Evaluation]:
    """The images of ``--val``, and what the model makes of them. Raises PtqError."""
    from ptq_onnx.calibration.class_output import features_of
    from ptq_onnx.evaluation import evaluate as evaluation
    from ptq_onnx.evaluation import network
    from ptq_onnx.evaluation.metrics.by_name import make_metric
    from ptq_onnx.pipeline.preprocessing import resolve_preprocess
    from ptq_onnx.pipeline.several_inputs import open_source

    shown = resolve_preprocess(path, options)
    source = open_source(path, paths["val"], shown, options.input)
    classes = bool(network.Network(path, 1).class_outputs)
    truths = paths.get("targets"), paths.get("labels")
    metric = make_metric(options.metric, options.metric_option, source, other or path, *truths)
    if not classes and other is None and metric is None:
        raise ConfigError(
            f"{path} has no output [batch, classes], so that only closeness to the float model"
            " can be measured: name that with --reference FLOAT.onnx."
        )
    truth = None
    if classes or "labels" in paths:  # the second is refused, before any image is read
        truth = _truth(source, paths.get("labels"), needed=other is None and metric is None)
    features = []
    if other is not None and classes and truth is None:
        features = features_of(other, source.preprocess.size)
    return source, evaluation.evaluate(
        path if npu is None else npu.open(path, options.threads),
        source,
        truth,
        batch_size=options.batch,
        threads=options.threads,
        workers=options.workers,
        reference=other,
        features=features,
        progress=None
        if progress is None
        else evaluation.since(progress("Measuring the model", len(source))),
        names=(f"Model '{path}'", None),
        metric=metric,
    )


def _print_json(path: Path, source: ImageSource, found: Evaluation) -> None:
    numbers = {
        "count": found.count,
        "skipped": len(source.skipped),
        "top1": found.top1,
        "top5": found.top5,
        "sqnr_db": in_json(found.sqnr_db),
        "agreement": found.agreement,
    }
    text = {"model": str(path), **{k: _finite(v) for k, v in numbers.items()}}
    score = {} if found.score is None else {"metric": asdict(found.score)}
    print(json.dumps({**text, **score, "outputs": [asdict(one) for one in found.outputs]}))


def _print_table(path: Path, source: ImageSource, found: Evaluation, *, compared: bool) -> None:
    """What was measured, row by row; ``compared``: with a reference."""
    rows = [
        ("preprocessing", source.preprocess.described),
        ("images", str(found.count)),
        ("unreadable, skipped", str(len(source.skipped))),
    ]
    several = len(found.outputs) > 1
    for one in found.outputs:
        if one.top1 is not None:
            where = f" of '{one.name}'" if several else ""
            rows += [(f"top-1{where}", percent(one.top1)), (f"top-5{where}", percent(one.top5))]
    if compared:
        worst = " of the worst output" if several else ""
        rows.append((f"SQNR against the reference{worst}", decibels(found.sqnr_db)))
        if found.agreement is not None:
            where = f" in '{found.main}'" if several else ""
            rows.append((f"same top class as the reference{where}", percent(found.agreement)))
    if found.score is not None:
        rows += _score_rows(found.score)
    stdout().print(simple_table((path.name, ""), rows))
    if several and compared:
        stdout().print(outputs_table([asdict(one) for one in found.outputs]))
    for note in found.notes:
        stdout().say(f"note: {note}")


def _score_rows(score: Score) -> list[tuple[str, str]]:
    """A metric, the float model's beside it, and what else it says."""
    value = metric_text(score.value, score.unit)
    if score.float_value is not None:
        value += f" (float {metric_text(score.float_value, score.unit)})"
    rows = [(f"{score.figure}, {truth_text(score.targets)}", value)]
    others = [(name, v) for name, v in score.figures.items() if name != score.figure]
    return rows + [(name, number(round(v, 4))) for name, v in others]


def _truth(source: Any, labels: str | None, needed: bool) -> Any:
    """Labels of the images; None where there are none and a reference will do."""
    from ptq_onnx.images.labels import labels_for

    try:
        return labels_for(source, labels)
    except ImageError:
        if labels is not None or needed:
            raise
        return None


def _finite(value: float | None) -> float | None:
    """JSON knows neither infinity nor NaN."""
    return value if value is None or math.isfinite(value) else None
