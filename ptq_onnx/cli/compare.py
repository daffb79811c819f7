"""The command ``ptq-onnx compare``: several quantized models side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from ptq_onnx.analysis.decibels import plain
from ptq_onnx.cli import options as o
from ptq_onnx.cli.console import (
    OUTPUT_COLUMNS,
    decibels,
    output_cells,
    percent,
    progress_bars,
    simple_table,
)
from ptq_onnx.cli.given import settings
from ptq_onnx.cli.npu import WORDS, Npu, npu_of
from ptq_onnx.cli.terminal import stdout
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.files.output_paths import Output
from ptq_onnx.files.publishing import added_to
from ptq_onnx.files.text_file import write_text
from ptq_onnx.images.source import ImageSource
from ptq_onnx.report.page_text import metric_text

if TYPE_CHECKING:
    from ptq_onnx.analysis.comparison_results import Comparison

PAGE, NUMBERS = "compare.html", "compare.json"

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="A B…", help="Folders that quantize wrote, or quantized .onnx files of any tool."
    ),
]


@o.takes(*o.PICTURES, *o.METRIC, "batch", "threads")
def compare(
    models: Models,
    val: o.Measured = None,
    labels: o.Labels = None,
    targets: o.Targets = None,
    reference: Annotated[
        str | None,
        o.option("--reference", "FLOAT.onnx", "fused.onnx of the first folder", "The float model."),
    ] = None,
    output: Annotated[
        str | None,
        o.option("--output -o", "DIR", "no files", "Folder of compare.html and compare.json."),
    ] = None,
    runtime: o.Runtime = "onnxruntime",
    soc: o.Soc = None,
    htp_arch: o.HtpArch = None,
    as_json: o.Json = False,
    config: o.Config = None,
    analysis_images: Annotated[
        int | None,
        o.option("--analysis-images", "N", 32, "Images for the SNR of the blocks."),
    ] = None,
    **given: Any,
) -> None:
    """Compare quantized files of one float model: accuracy, SQNR, blocks, size, speed."""
    options, paths = settings(config, locals() | given)
    npu = npu_of(runtime, soc, htp_arch)
    if "val" not in paths:
        raise ConfigError("compare needs images: --val DIR.")
    folder = Output.of_reports(paths["output"]).folder if "output" in paths else None
    found = compared(models, reference, options, paths, npu)
    if npu is not None:
        print(f"{WORDS} Blocks and times are ONNX Runtime's.", file=sys.stderr)
    if folder is not None:
        write_comparison(found, folder)
    if as_json:
        print(json.dumps(plain(asdict(found)), allow_nan=False))
        return
    stdout().print(table(found))
    if any(len(one.outputs) > 1 for one in found.contenders):
        stdout().print(outputs_table(found))
    for note in found.notes:
        stdout().say(f"note: {note}")
    if folder is not None:
        print("Written:")
        for name in (PAGE, NUMBERS):
            stdout().say(f"  {folder / name}")


def compared(
    models: list[str],
    reference: str | None,
    options: QuantizeConfig,
    paths: Mapping[str, Any],
    npu: Npu | None = None,
) -> Comparison:
    """The files measured on the images of ``--val``, with a bar; on the NPU where one is given.

    Raises PtqError.
    """
    with progress_bars() as progress:
        from ptq_onnx.analysis import compare as comparison
        from ptq_onnx.evaluation.metrics.by_name import make_metric
        from ptq_onnx.pipeline.preprocessing import resolve_preprocess
        from ptq_onnx.pipeline.several_inputs import open_source

        base = comparison.find_reference(models, reference)
        shown = resolve_preprocess(base, options)
        source = open_source(base, paths["val"], shown, options.input)
        chosen = options.metric, options.metric_option
        return comparison.compare(
            models,
            source,
            reference=base,
            labels=truth(base, source, paths.get("labels")),
            block_images=options.analysed,
            batch=options.batch,
            threads=options.threads,
            progress=progress,
            metric=make_metric(*chosen, source, base, paths.get("targets"), paths.get("labels")),
            opened=None if npu is None else partial(npu.open, threads=options.threads),
        )


def truth(base: Path, source: ImageSource, labels: str | None) -> NDArray[np.int64] | None:
    """The classes [N] of the images, from the file or from their folders, unless these are no
    classes of the model. Raises ImageError for a file that does not fit."""
    from ptq_onnx.analysis.compare import classifies
    from ptq_onnx.images.labels import labels_for

    try:
        found = labels_for(source, labels)
    except ImageError:
        if labels is not None:
            raise
        found = None
    return found if labels is not None or classifies(base) else None


def write_comparison(found: Comparison, folder: Path) -> None:
    """``compare.json`` and the page, in a folder that is made where it does not exist."""
    from ptq_onnx.report.compare_page import render_comparison

    numbers = json.dumps(plain(asdict(found)), indent=1, allow_nan=False)
    with added_to(folder) as work:
        write_text(work / NUMBERS, numbers)
        write_text(work / PAGE, render_comparison(found))


def table(found: Any) -> Any:
    """One row per model."""
    rows = []
    scored = next((c.score for c in found.contenders if c.score is not None), None)
    for one in found.contenders:
        first = percent(one.top1)
        if scored is not None:
            value = scored.float_value if one.score is None else one.score.value
            first = metric_text(value, scored.unit)
        known = [b.snr_db for b in one.blocks if b.snr_db is not None]
        rows.append(
            (
                one.name,
                first,
                decibels(one.sqnr_db) if one.name != "float" else "",
                percent(one.agreement),
                decibels(known[-1]) if known else "-",
                f"{one.bytes / 1e6:.2f} MB",
                f"{one.ms_per_image:.1f} ms",
            )
        )
    titles = (
        "model",
        "top-1" if scored is None else scored.figure,
        "SQNR",
        "same class",
        "last block",
        "size",
        "an image",
    )
    return simple_table(titles, rows)


def outputs_table(found: Any) -> Any:
    """One row per model and output."""
    rows = []
    for one in found.contenders[1:]:
        for index, output in enumerate(one.outputs):
            name = one.name if index == 0 else ""
            rows.append((name, output.name, *output_cells(asdict(output))))
    return simple_table(("model", "output", *OUTPUT_COLUMNS), rows)
