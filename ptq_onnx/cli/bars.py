"""Progress on a terminal: a line for each stage that is over, and below them what goes on now.

The running stage and the whole job are two lines that move; a stage that is over becomes a line
of the scrollback, its clock at rest, so that no list of stages outgrows the screen.
"""

from __future__ import annotations

from typing import TextIO

from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TimeElapsedColumn
from rich.progress import Progress as Live
from rich.text import Text

from ptq_onnx.cli.terminal import Screen
from ptq_onnx.files.file_names import printable
from ptq_onnx.progress import WHOLE, Advance

STARTING = "Starting"
NAME, BAR, COUNT = 34, 20, 11
"""Columns of a line, of which 80 hold all, with the clock."""


class _Name(ProgressColumn):
    def render(self, task: Task) -> Text:
        """The stage's name, cut or filled up to one width."""
        name = printable(task.description)
        return Text(name if len(name) <= NAME else f"{name[: NAME - 1]}…").append(
            " " * (NAME - len(name))
        )


class _Count(ProgressColumn):
    """``12/64``; of the whole job, percent."""

    def render(self, task: Task) -> Text:
        """Steps done of all; of the whole job the percentage; blank where the total is not
        known."""
        if task.total is None:
            return Text(" " * COUNT)
        whole = task.description == WHOLE
        text = f"{task.percentage:.0f} %" if whole else f"{task.completed:.0f}/{task.total:.0f}"
        return Text(text.rjust(COUNT))


class Bars:
    """What the library takes as ``progress``, drawn on a terminal; a context manager."""

    def __init__(self, stream: TextIO) -> None:
        columns = _Name(), BarColumn(bar_width=BAR), _Count(), TimeElapsedColumn()
        self._screen = Screen(stream)
        self._live = Live(*columns, console=self._screen)
        self._running: TaskID | None = self._live.add_task(STARTING, total=None)

    @property
    def console(self) -> Screen:
        """What writes above the bars."""
        return self._screen

    def __enter__(self) -> Bars:
        self._live.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._end(finished=kind is None)
        self._live.stop()

    def __call__(self, stage: str, total: int) -> Advance:
        """Begin a stage; the one before is over, but for the whole job."""
        if stage != WHOLE:
            self._end(finished=True)
        task = self._live.add_task(stage, total=total)
        if stage != WHOLE:
            self._running = task
        return lambda done: self._live.advance(task, done)

    def _end(self, *, finished: bool) -> None:
        """Leave a line of the stage that runs; where it broke off, as far as it came."""
        if self._running is None:
            return
        (task,) = [t for t in self._live.tasks if t.id == self._running]
        self._running = None
        if finished and task.total is not None:
            # What could not be done, as unreadable images, is no part of it.
            self._live.update(task.id, total=task.completed or task.total)
            self._live.update(task.id, completed=task.total)
        task.stop_time = task.get_time()
        self._live.remove_task(task.id)
        self._live.refresh()  # what moves no longer shows it when its line is written above
        if task.total is not None:
            self._live.console.print(self._live.make_tasks_table([task]))
