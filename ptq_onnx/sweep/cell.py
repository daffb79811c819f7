"""What is kept of a cell: its row, and ``cell.json`` beside the usual result in its folder."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ptq_onnx.errors import PtqError
from ptq_onnx.files.publishing import publish, workshop
from ptq_onnx.files.result_names import PAGE
from ptq_onnx.files.text_file import read_text, write_text
from ptq_onnx.pipeline.result import Result
from ptq_onnx.sweep.matrix import AXES, Cell

RECORD = "cell.json"
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


@dataclass(frozen=True)
class Spent:
    """What stages took: seconds in all, most bytes of a process, most attempts."""

    seconds: float = 0.0
    peak_bytes: int | None = None
    attempts: int = 1

    @classmethod
    def since(cls, begin: float, attempt: int) -> Spent:
        """By this process, since a time of the monotonic clock."""
        return cls(time.monotonic() - begin, _peak(), attempt)

    def __add__(self, other: Spent) -> Spent:
        """Of both."""
        peaks = [p for p in (self.peak_bytes, other.peak_bytes) if p is not None]
        most = max(self.attempts, other.attempts)
        return Spent(self.seconds + other.seconds, max(peaks, default=None), most)


NOTHING = Spent()


def keep(row: Row, spent: Spent, place: Path, mark: str) -> Row:
    """Write the record of a cell, its results being there: it is done by that."""
    seconds, peak, attempts = round(spent.seconds, 2), spent.peak_bytes, spent.attempts
    row = replace(row, seconds=seconds, peak_bytes=peak, attempts=attempts)
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


def measured(cell: Cell, result: Result) -> Row:
    """The row of a cell that is done."""
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


def check_folder(folder: Path, notice: str) -> None:
    """Refuse a folder that is not the sweep's. Raises PtqError."""
    if notice and not seen(folder, notice):
        raise PtqError(
            f"This node ({os.uname().nodename}) does not see {folder}: models, images and output"
            " must lie where all nodes find them by the same path"
        )


def seen(folder: Path, notice: str) -> bool:
    """Whether it is the sweep's folder, by what lies in it."""
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
