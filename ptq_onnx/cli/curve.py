"""The command ``ptq-onnx calibration-curve``: accuracy over the number of calibration images."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table

from ptq_onnx.cli import options as o
from ptq_onnx.cli.console import decibels, percent, progress_bars, simple_table
from ptq_onnx.cli.given import settings
from ptq_onnx.cli.terminal import stdout
from ptq_onnx.config.option_types import shown
from ptq_onnx.errors import ConfigError
from ptq_onnx.files.output_paths import Output
from ptq_onnx.pipeline.model_path import find_model
from ptq_onnx.report.page_text import metric_text

if TYPE_CHECKING:
    from ptq_onnx.pipeline.calibration_curve import Curve

NOT_VARIED = (
    *("images", "check_preprocess", "auto", "max_drop", "min_sqnr", "arithmetic"),
    *("multiplier_bits", "gelu", "report", "sensitivity", "pictures", "attention_blocks"),
    *("attention_heads", "analysis_images"),
)
"""Options of ``quantize`` that have no meaning, or another one, over numbers of images."""


@o.takes(without=NOT_VARIED)
def calibration_curve(
    model: o.Model,
    calib: o.Calib = None,
    val: o.Measured = None,
    labels: o.Labels = None,
    targets: o.Targets = None,
    output: o.Folder = None,
    sizes: Annotated[
        str | None,
        o.option("--sizes", "N,N,…", "1,4,16,64,256", "Numbers of calibration images."),
    ] = None,
    config: o.Config = None,
    **given: Any,
) -> None:
    """Draw accuracy or SQNR over the number of calibration images, real ones and drawn ones."""
    counts = None if sizes is None else _counts(sizes)
    options, paths = settings(config, locals() | given)
    path = find_model(model)
    if "val" not in paths:
        raise ConfigError("calibration-curve needs images to measure on: --val DIR.")
    target_folder = Output.of_reports(paths.get("output", "output")).folder
    with progress_bars() as progress:
        from ptq_onnx.pipeline.calibration_curve import SIZES, measure_curve, write_curve

        found = measure_curve(
            path,
            config=options,
            val=paths["val"],
            calib=paths.get("calib"),
            labels=paths.get("labels"),
            targets=paths.get("targets"),
            sizes=counts or SIZES,
            progress=progress,
        )
    files = write_curve(found, target_folder)
    console = stdout()
    console.print(table(found))
    for note in found.notes:
        console.say(f"note: {note}")
    console.print("Written:")
    for file in files:
        console.say(f"  {file}")


def table(curve: Curve) -> Table:
    """A row for each number of images and source."""

    def measured(top1: float | None, score: float | None) -> str:
        return percent(top1) if curve.metric is None else metric_text(score, curve.unit)

    rows = [
        (
            p.source,
            str(p.images),
            measured(p.top1, p.score),
            decibels(p.sqnr_db),
            percent(p.agreement),
        )
        for p in curve.points
    ]
    if curve.float_top1 is not None or curve.metric is not None:
        rows.insert(0, ("float", "-", measured(curve.float_top1, curve.float_score), "-", "-"))
    names = ("calibrated with", "images", curve.metric or "top-1", "SQNR", "same top class")
    return simple_table(names, rows)


def _counts(text: str) -> tuple[int, ...]:
    """``1,4,16``. Raises ConfigError."""
    parts = [p.strip() for p in text.split(",")]
    if not all(re.fullmatch("0*[1-9][0-9]{0,6}", p) for p in parts):
        raise ConfigError(f"--sizes {shown(text)}: expected numbers of images, as in 1,4,16.")
    return tuple(int(p) for p in parts)
