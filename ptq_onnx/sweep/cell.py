"""One cell run, and what is kept of it: the usual result in a folder, with ``cell.json``."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ptq_onnx.errors import PtqError, one_line
from ptq_onnx.files.publishing import publish, workshop
from ptq_onnx.files.result_names import PAGE
from ptq_onnx.files.text_file import read_text, write_text
from ptq_onnx.sweep.fingerprint import of_images
from ptq_onnx.sweep.matrix import AXES, Cell

RECORD = "cell.json"
FLOATS = ".floats"
"""In the sweep's folder while it runs: outputs of the float models."""
DONE, FAILED, REFUSED = "done", "failed", "refused"
NOTICE = ".sweep"
"""A file of the running sweep in its folder, by which a node sees that it is the same folder."""


@dataclass(frozen=True)
class Row:
    """A cell and what came of it. Accuracies and ``agreement`` in %, ``sqnr_db`` of the worst
    output on ``images``; sizes in bytes; ``page``: whether there is a report to look at.
    ``seconds``, ``peak_bytes`` (of the process, with what it ran before) and ``attempts`` are of
    the run, all else is the same however it was run."""

    cell: str
    axes: Mapping[str, str]
    status: str
    reason: str | None = None
    float_bytes: int | None = None
    quantized_bytes: int | None = None
    float_top1: float | None = None
    top1: float | None = None
    sqnr_db: float | None = None
    agreement: float | None = None
    images: int | None = None
    notes: int = 0
    page: bool = False
    seconds: float | None = None
    peak_bytes: int | None = None
    attempts: int = 1

    @classmethod
    def of(cls, cell: Cell, status: str, reason: str | None = None, **more: Any) -> Row:
        """A row without figures."""
        return cls(cell.name, {axis: cell.axes[axis] for axis in AXES}, status, reason, **more)


def run_cell(cell: Cell, folder: Path, mark: str, notice: str = "", attempt: int = 1) -> Row:
    """Quantize a cell into its place in ``folder``; ``cell.json``, with ``mark``, comes last.

    A failure is a row, and its folder then holds nothing but that. ``notice``: what the sweep's
    folder must hold to be the one that was meant.
    """
    place = folder / cell.name
    begin = time.monotonic()
    try:
        _check_folder(folder, notice)
        row = _quantized(cell, place, folder / FLOATS)
    except Exception as error:
        known = isinstance(error, PtqError | OSError)
        reason = one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
        row = failed(cell, reason, attempt)
        if notice and not _seen(folder, notice):
            return row
        return keep_failure(row, place)
    seconds = round(time.monotonic() - begin, 2)
    row = replace(row, seconds=seconds, peak_bytes=_peak(), attempts=attempt)
    write_text(place / RECORD, _text(row, mark))
    return row


def failed(cell: Cell, reason: str, attempt: int) -> Row:
    """The row of a cell that failed."""
    return Row.of(cell, FAILED, f"{reason}.", attempts=attempt)


def keep_failure(row: Row, place: Path) -> Row:
    """Let the folder of a cell hold why it failed, in place of any results; a disk that takes no
    more is no second failure."""
    try:
        with workshop(place) as work:
            (work / RECORD).write_text(_text(row, ""), encoding="utf-8")
            publish(work, place)
    except (PtqError, OSError):
        pass
    return row


def finished(cell: Cell, folder: Path, mark: str) -> Row | None:
    """The row of a cell that is done in ``folder`` and was run with the same ``mark``."""
    try:
        values = json.loads(read_text(folder / cell.name / RECORD))
        if values.pop("mark") != mark or values["status"] != DONE:
            return None
        return Row(**{field.name: values[field.name] for field in fields(Row)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _quantized(cell: Cell, place: Path, floats: Path) -> Row:
    """``floats``: where cells of the same model share what it gives on the same images."""
    from ptq_onnx.pipeline.quantize import quantize

    # A record of other numbers must not outlive the numbers
    (place / RECORD).unlink(missing_ok=True)
    assert cell.config is not None
    result = quantize(
        cell.model,
        config=cell.config,
        output=place,
        calib=cell.calib,
        val=cell.val,
        labels=cell.labels,
        floats=None if cell.val is None else floats / str(of_images(cell.val)),
    )
    report = result.report
    accuracy, fidelity = report.get("accuracy") or {}, report.get("fidelity") or {}
    return Row.of(
        cell,
        DONE,
        float_bytes=report["sizes"]["float"],
        quantized_bytes=report["sizes"]["quantized"],
        float_top1=(accuracy.get("float") or {}).get("top1"),
        top1=(accuracy.get("quantized") or {}).get("top1"),
        sqnr_db=fidelity.get("sqnr_db"),
        agreement=fidelity.get("agreement"),
        images=fidelity.get("images"),
        notes=len(report.get("notes") or ()),
        page=any(file.name == PAGE for file in result.files),
    )


def _check_folder(folder: Path, notice: str) -> None:
    if notice and not _seen(folder, notice):
        raise PtqError(
            f"This node ({os.uname().nodename}) does not see {folder}: models, images and output"
            " must lie where all nodes find them by the same path"
        )


def _seen(folder: Path, notice: str) -> bool:
    try:
        return read_text(folder / NOTICE) == notice
    except OSError:
        return False


def _text(row: Row, mark: str) -> str:
    return json.dumps({**asdict(row), "mark": mark}, indent=1, allow_nan=False) + "\n"


def _peak() -> int | None:
    """Bytes of memory that the process has had at most, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
