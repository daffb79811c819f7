"""The command ``ptq-onnx sweep``: a matrix of quantizations, on this machine or a cluster."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ptq_onnx.cli import options as o
from ptq_onnx.cli.console import decibels, percent, simple_table
from ptq_onnx.cli.sweep_bar import sweep_bar
from ptq_onnx.cli.terminal import stdout
from ptq_onnx.errors import ConfigError
from ptq_onnx.files.output_paths import Output

if TYPE_CHECKING:
    from ptq_onnx.sweep.matrix import Cell
    from ptq_onnx.sweep.running import Found

SOME_FAILED = 1
"""Exit code where cells failed; those that are refused did not."""
MOST_ROWS = 200
"""Rows of the table on the console; the files have all."""


def sweep(
    sweep_file: Annotated[
        str, typer.Argument(metavar="SWEEP.yaml", help="The matrix: models, recipes, bits, …")
    ],
    output: Annotated[
        str | None, o.option("--output -o", "DIR", "sweep", "Folder of the cells and the results.")
    ] = None,
    workers: Annotated[
        int | None,
        o.option("--workers", "N", "as many as cores and memory hold", "Cells at a time, here."),
    ] = None,
    address: Annotated[
        str | None,
        o.option("--address", "HOST:PORT", "this machine alone", "A cluster of Ray to run on."),
    ] = None,
) -> None:
    """Quantize a matrix of models, recipes, targets, bits, images and seeds, each cell a folder.

    The same command again goes on where the last one ended.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}.")
    if workers is not None and address is not None:
        raise ConfigError("--workers is for this machine; a cluster at --address fills itself.")
    folder = Output.of_reports(output or "sweep").folder
    from ptq_onnx.sweep.matrix import cells_of
    from ptq_onnx.sweep.matrix_file import read_sweep
    from ptq_onnx.sweep.results import write_results
    from ptq_onnx.sweep.running import Machines, run

    matrix = read_sweep(sweep_file)
    cells = cells_of(matrix)
    with sweep_bar(sys.stderr) as begun:
        found = run(cells, folder, Machines(workers, address, matrix.gpus), matrix.retries, begun)
    files = write_results(found.rows, folder, Path(sweep_file).name)
    _show(found, cells, files)
    if any(row.status == "failed" for row in found.rows):
        raise typer.Exit(SOME_FAILED)


def _show(found: Found, cells: list[Cell], files: tuple[Path, ...]) -> None:
    """The table, what failed, the notes and the files."""
    console = stdout()
    console.print(table(found, cells))
    if len(found.rows) > MOST_ROWS:
        console.say(f"The first {MOST_ROWS} of {len(found.rows)} cells; the files have all.")
    for row in found.rows:
        if row.status != "done":
            console.say(f"{row.status}: {row.cell}: {row.reason}")
    for note in found.notes:
        console.say(f"note: {note}")
    counts = Counter(row.status for row in found.rows)
    told = ", ".join(f"{counts[name]} {name}" for name in ("done", "failed", "refused"))
    before = f" ({found.before} of them before)" if found.before else ""
    console.say(f"{len(found.rows)} cell{'s' * (len(found.rows) > 1)}: {told}{before}.")
    console.print("Written:")
    for file in files:
        console.say(f"  {file}")


def table(found: Found, cells: list[Cell]) -> Table:
    """A row for each cell, with the axes on which they differ."""
    from ptq_onnx.sweep.matrix import varied

    axes = varied(cells) or ["model"]
    rows: list[tuple[Any, ...]] = []
    for row in found.rows[:MOST_ROWS]:
        size = "-" if row.quantized_bytes is None else f"{row.quantized_bytes / 1e6:.2f} MB"
        seconds = row.status if row.seconds is None else f"{row.seconds:.1f} s"
        figures = percent(row.top1), decibels(row.sqnr_db), percent(row.agreement)
        rows.append((*(row.axes[axis] for axis in axes), *figures, size, seconds))
    return simple_table((*axes, "top-1", "SQNR", "same class", "size", "time"), rows)
