"""What a process does for a sweep: the stages of cells, each a function of values and folders."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from ptq_onnx.errors import PtqError, one_line
from ptq_onnx.files.output_paths import Output
from ptq_onnx.pipeline.apart import Opened, Unfinished, finish, measure_part, quantize_apart
from ptq_onnx.pipeline.reading import preparing
from ptq_onnx.pipeline.request import Request, Shared
from ptq_onnx.pipeline.result import Result
from ptq_onnx.sweep.cell import (
    NOTHING,
    RECORD,
    Row,
    Spent,
    check_folder,
    failed,
    keep,
    keep_failure,
    measured,
    seen,
)
from ptq_onnx.sweep.fingerprint import of_images
from ptq_onnx.sweep.matrix import Cell
from ptq_onnx.sweep.stages import FINISH, FLOAT, MEASURE, PREPARE, WRITE, Measured, Task, Written

BETWEEN = ".stages"
"""In the sweep's folder while it runs: what one stage leaves for another."""


@dataclass(frozen=True)
class Place:
    """The sweep's folder, and ``notice``: what it must hold to be the one that was meant."""

    folder: Path
    notice: str = ""

    @property
    def between(self) -> Path:
        """The folder of what is between the stages."""
        return self.folder / BETWEEN

    def request(self, cell: Cell) -> Request:
        """What a cell asks for."""
        assert cell.config is not None
        floats = self.between / "floats" / str(of_images(cell.val))
        return Request(
            model=cell.model,
            config=cell.config,
            place=Output.at(self.folder / cell.name),
            calib=cell.calib,
            val=cell.val,
            labels=cell.labels,
            shared=Shared(None if cell.val is None else floats, self.between / "prepared"),
        )


def do(task: Task, place: Place, mark: str, attempt: int) -> Row | Written | Measured:
    """One stage of a cell. ``mark``: of the cell, for its record, which comes last.

    A failure of the cell is a row, and its folder then holds nothing but that.
    """
    if task.stage == PREPARE:
        return _prepared(task, place)
    if task.stage in (FLOAT, MEASURE):
        return _measured(task, place, attempt)
    _opened().close()
    unfinished = task.unfinished
    if task.stage == FINISH and unfinished is not None:
        run: Callable[[], Result | Unfinished] = partial(finish, unfinished, whole=task.whole)
        return _tried(task.cell, place, mark, task.spent, attempt, run)
    hidden = place.between / "cells" / task.cell.name
    run = partial(_begun, task.cell, place, hidden)
    return _tried(task.cell, place, mark, NOTHING, attempt, run)


def run_cell(cell: Cell, folder: Path, mark: str, notice: str = "", attempt: int = 1) -> Row:
    """All stages of a cell, by this process."""
    place = Place(folder, notice)
    found = do(Task(WRITE, cell), place, mark, attempt)
    if isinstance(found, Written):
        task = Task(FINISH, cell, (0, 0), found.unfinished, False, found.spent)
        found = do(task, place, mark, attempt)
    assert isinstance(found, Row)
    return found


def _begun(cell: Cell, place: Place, hidden: Path) -> Result | Unfinished:
    # A record of other numbers must not outlive the numbers
    (place.folder / cell.name / RECORD).unlink(missing_ok=True)
    return quantize_apart(place.request(cell), hidden)


def _tried(
    cell: Cell,
    place: Place,
    mark: str,
    before: Spent,
    attempt: int,
    run: Callable[[], Result | Unfinished],
) -> Row | Written:
    """What a stage of one cell gives; its failure is a row. ``before``: what its others took."""
    begin = time.monotonic()
    try:
        check_folder(place.folder, place.notice)
        found = run()
    except Exception as error:
        known = isinstance(error, PtqError | OSError)
        reason = one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
        row = failed(cell, reason, attempt)
        if place.notice and not seen(place.folder, place.notice):
            return row
        return keep_failure(row, place.folder / cell.name)
    spent = before + Spent.since(begin, attempt)
    if isinstance(found, Unfinished):
        return Written(found, spent)
    return keep(measured(cell, found), spent, place.folder / cell.name, mark)


def _prepared(task: Task, place: Place) -> Measured:
    """The model of a cell prepared and kept; where that fails each cell says why."""
    begin = time.monotonic()
    try:
        check_folder(place.folder, place.notice)
        preparing(place.request(task.cell)).keep(place.between / "prepared")
    except Exception:
        return Measured(False, Spent.since(begin, 1))
    return Measured(True, Spent.since(begin, 1))


def _measured(task: Task, place: Place, attempt: int) -> Measured:
    """A part run and kept; where that fails the cell is measured by one process, which says why."""
    begin, kept = time.monotonic(), False
    try:
        check_folder(place.folder, place.notice)
        assert task.unfinished is not None
        quantized = task.stage == MEASURE
        kept = measure_part(task.unfinished, task.part, _opened(), quantized=quantized)
    except Exception:
        kept = False
    return Measured(kept, Spent.since(begin, attempt))


@cache
def _opened() -> Opened:
    """What this process has open."""
    return Opened()
