"""The rows of a sweep as files: a page, a table for spreadsheets, and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ptq_onnx.files.publishing import added_to
from ptq_onnx.files.result_names import PAGE
from ptq_onnx.files.text_file import write_text
from ptq_onnx.report.sweep_page import render_sweep
from ptq_onnx.sweep.cell import Row
from ptq_onnx.sweep.matrix import AXES
from ptq_onnx.version import __version__

SWEEP_PAGE, SWEEP_NUMBERS, SWEEP_TABLE = "sweep.html", "sweep.json", "sweep.csv"
OF_THE_RUN = ("seconds", "peak_bytes", "attempts")
"""What differs from run to run."""


def write_results(rows: Sequence[Row], folder: Path, title: str) -> tuple[Path, ...]:
    """All three in ``folder``, all or none; returns their paths."""
    plain = [flat(row) for row in rows]
    with added_to(folder) as work:
        write_text(work / SWEEP_PAGE, render_sweep(title, AXES, plain))
        write_text(work / SWEEP_NUMBERS, numbers(rows))
        write_text(work / SWEEP_TABLE, table(plain))
    return tuple(folder / name for name in (SWEEP_PAGE, SWEEP_TABLE, SWEEP_NUMBERS))


def flat(row: Row) -> dict[str, Any]:
    """A row without nesting, with the page of its report, relative to the sweep's folder."""
    values = asdict(row)
    axes, page = values.pop("axes"), values.pop("page")
    return {
        "cell": values.pop("cell"),
        **axes,
        **values,
        "report": f"{row.cell}/{PAGE}" if page else None,
    }


def numbers(rows: Sequence[Row]) -> str:
    """JSON: the cells, what is of the run apart from what is the same in every one."""
    cells = []
    for row in rows:
        values = asdict(row)
        run = {name: values.pop(name) for name in OF_THE_RUN}
        cells.append({**values, "run": run})
    found = {"ptq_onnx": __version__, "axes": list(AXES), "cells": cells}
    return json.dumps(found, indent=1, allow_nan=False) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a heading; empty where nothing was measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["cell"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
