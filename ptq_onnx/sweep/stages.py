"""The stages of a sweep's cells as tasks, and which of them can run: values, without Ray.

A model is prepared once for all cells that need it the same; a cell then writes its file, which is
measured in parts where there are many images, and is finished. What is nearest to a finished cell
goes first, so that cells end one by one and few are half done at any time.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptq_onnx.evaluation.parts import Part
from ptq_onnx.pipeline.apart import Unfinished
from ptq_onnx.sweep.cell import DONE, NOTHING, Row, Spent
from ptq_onnx.sweep.matrix import Cell

FINISH, FLOAT, MEASURE, PREPARE, WRITE = range(5)
"""The stages by urgency: ``FLOAT`` runs the float model on a part of the images, for all cells that
measure theirs on the same, ``MEASURE`` a cell's own file."""
NAMES = {FINISH: "finish", FLOAT: "float", MEASURE: "measure", PREPARE: "prepare", WRITE: "write"}
"""What Ray's own tools call them."""


@dataclass(frozen=True)
class Task:
    """One stage of a cell, or of several, of which ``cell`` is the first. ``whole``: the outputs on
    all parts are there to finish with."""

    stage: int
    cell: Cell
    part: Part = (0, 0)
    unfinished: Unfinished | None = None
    whole: bool = True
    spent: Spent = NOTHING


@dataclass(frozen=True)
class Written:
    """What a cell's first stage gives where its file is still to be measured."""

    unfinished: Unfinished
    spent: Spent


@dataclass(frozen=True)
class Measured:
    """What a part gives: whether all its outputs were kept."""

    kept: bool
    spent: Spent


@dataclass
class _Parts:
    """Parts that are waited for, and what is known of those that came."""

    left: int
    whole: bool = True
    spent: Spent = NOTHING


class Schedule:
    """The tasks of ``cells``, in that order where nothing else says which is first. ``prepared``:
    by a cell what decides its prepared model; None where there is no use in sharing it."""

    def __init__(self, cells: Sequence[Cell], prepared: Callable[[Cell], Hashable]) -> None:
        self.left = len(cells)
        """Cells that are not done."""
        self.alone = 0
        """Cells that were measured by one process, as some of the parts were not whole."""
        self._rank = {cell.name: number for number, cell in enumerate(cells)}
        self._ready: list[tuple[int, int, int, Task]] = []
        self._count = 0
        self._alike: dict[str, list[Cell]] = {}
        """Cells that wait for a prepared model, by the name of the first."""
        self._open: dict[str, tuple[Cell, Written]] = {}
        """Cells that wait for parts, by name."""
        self._own: dict[str, _Parts] = {}
        self._floats: dict[Path, _Parts] = {}
        """Those of a cell, by name, and those of a float model, by their place."""
        self._lost: set[str] = set()
        alike: dict[Hashable, list[Cell]] = defaultdict(list)
        for cell in cells:
            key = prepared(cell)
            alike[cell.name if key is None else key].append(cell)
        for group in alike.values():
            self._alike[group[0].name] = group
            self._add(Task(PREPARE if len(group) > 1 else WRITE, group[0]))

    def next(self) -> Task | None:
        """The most urgent task that can run now, which is then the caller's; None where there is
        none."""
        return heapq.heappop(self._ready)[-1] if self._ready else None

    def took(self, task: Task, found: Row | Written | Measured | None) -> Row | None:
        """What a task gave; the row of its cell, where that is done by it."""
        if isinstance(found, Row):
            self.left -= 1
            self.alone += task.stage == FINISH and not task.whole and found.status == DONE
            return found
        if task.stage == PREPARE:
            self._add(*(Task(WRITE, cell) for cell in self._alike.pop(task.cell.name)))
        elif isinstance(found, Written):
            self._wait(task.cell, found)
        elif isinstance(found, Measured):
            self._came(task, found)
        return None

    def lost(self, task: Task, row: Row) -> Row | None:
        """A task that will not be done: ``row`` where that ends its cell; what is shared, each cell
        does without."""
        if task.stage in (PREPARE, FLOAT):
            return self.took(task, Measured(False, NOTHING))
        if task.cell.name in self._lost:
            return None
        self.left -= 1
        self._lost.add(task.cell.name)
        self._open.pop(task.cell.name, None)
        self._own.pop(task.cell.name, None)
        self._ready = [r for r in self._ready if r[-1].cell != task.cell or r[-1].stage == FLOAT]
        heapq.heapify(self._ready)
        return row

    def _wait(self, cell: Cell, written: Written) -> None:
        """A cell's parts, and those of its float model where they are nobody's yet."""
        found, stages = written.unfinished, [MEASURE]
        self._open[cell.name] = cell, written
        self._own[cell.name] = _Parts(len(found.parts))
        if found.floats.path not in self._floats:
            self._floats[found.floats.path] = _Parts(len(found.parts))
            stages = [FLOAT, MEASURE]
        self._add(*(Task(s, cell, part, found) for s in stages for part in found.parts))

    def _came(self, task: Task, found: Measured) -> None:
        """A part, after which the cells go on for which all are there."""
        assert task.unfinished is not None
        floats = self._floats[task.unfinished.floats.path]
        parts = floats if task.stage == FLOAT else self._own.get(task.cell.name)
        if parts is None:  # of a cell that failed meanwhile
            return
        parts.left -= 1
        parts.whole &= found.kept
        parts.spent += found.spent
        for name, (cell, written) in list(self._open.items()):
            own, shared = self._own[name], self._floats[written.unfinished.floats.path]
            if own.left == shared.left == 0:
                del self._open[name], self._own[name]
                spent, whole = written.spent + own.spent, own.whole and shared.whole
                self._add(Task(FINISH, cell, (0, 0), written.unfinished, whole, spent))

    def _add(self, *tasks: Task) -> None:
        for task in tasks:
            urgency = WRITE if task.stage == PREPARE else task.stage
            self._count += 1
            entry = urgency, self._rank[task.cell.name], self._count, task
            heapq.heappush(self._ready, entry)
