"""The command ``ptq-onnx compare``: several quantized models side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

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
from ptq_onnx.cli.terminal import stdout
from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.files.output_paths import Output
from ptq_onnx.files.text_file import write_text

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="A B…", help="Folders that quantize wrote, or quantized .onnx files of any tool."
    ),
]


@o.takes(*o.PICTURES, "batch", "threads")
def compare(
    models: Models,
    val: o.Measured = None,
    labels: o.Labels = None,
    reference: Annotated[
        str | None,
        o.option("--reference", "FLOAT.onnx", "fused.onnx of the first folder", "The float model."),
    ] = None,
    output: Annotated[
        str | None,
        o.option("--output -o", "DIR", "no files", "Folder of compare.html and compare.json."),
    ] = None,
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
    if "val" not in paths:
        raise ConfigError("compare needs images: --val DIR.")
    folder = Output.of_reports(paths["output"]).folder if "output" in paths else None
    with progress_bars() as progress:
        from ptq_onnx.analysis import compare as comparison
        from ptq_onnx.analysis.decibels import plain
        from ptq_onnx.images.labels import labels_for
        from ptq_onnx.images.opening import open_images
        from ptq_onnx.pipeline.preprocessing import resolve_preprocess
        from ptq_onnx.report.compare_page import render_comparison

        base = comparison.find_reference(models, reference)
        source = open_images(paths["val"], resolve_preprocess(base, options))
        try:
            truth = labels_for(source, paths.get("labels"))
        except ImageError:
            if "labels" in paths:
                raise
            truth = None
        if "labels" not in paths and not comparison.classifies(base):
            truth = None  # its folders are no classes
        found = comparison.compare(
            models,
            source,
            reference=base,
            labels=truth,
            block_images=options.analysis_images,
            batch=options.batch,
            threads=options.threads,
            progress=progress,
        )
    numbers = plain(asdict(found))
    text = json.dumps(numbers, indent=1, allow_nan=False)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "compare.json", text)
        write_text(folder / "compare.html", render_comparison(found))
    if as_json:
        print(json.dumps(numbers, allow_nan=False))
        return
    stdout().print(table(found))
    if any(len(one.outputs) > 1 for one in found.contenders):
        stdout().print(outputs_table(found))
    for note in found.notes:
        stdout().say(f"note: {note}")
    if folder is not None:
        print("Written:")
        for name in ("compare.html", "compare.json"):
            stdout().say(f"  {folder / name}")


def table(found: Any) -> Any:
    """One row per model."""
    rows = []
    for one in found.contenders:
        known = [b.snr_db for b in one.blocks if b.snr_db is not None]
        rows.append(
            (
                one.name,
                percent(one.top1),
                decibels(one.sqnr_db) if one.name != "float" else "",
                percent(one.agreement),
                decibels(known[-1]) if known else "-",
                f"{one.bytes / 1e6:.2f} MB",
                f"{one.ms_per_image:.1f} ms",
            )
        )
    titles = ("model", "top-1", "SQNR", "same class", "last block", "size", "an image")
    return simple_table(titles, rows)


def outputs_table(found: Any) -> Any:
    """One row per model and output."""
    rows = []
    for one in found.contenders[1:]:
        for index, output in enumerate(one.outputs):
            name = one.name if index == 0 else ""
            rows.append((name, output.name, *output_cells(asdict(output))))
    return simple_table(("model", "output", *OUTPUT_COLUMNS), rows)
