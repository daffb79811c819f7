"""Progress of a sweep on a terminal: one line that moves, and a line for each cell that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ptq_onnx.cli.terminal import Screen
from ptq_onnx.progress import silent

if TYPE_CHECKING:
    from ptq_onnx.sweep.cell import Row

Begun = Callable[[int, int], Callable[["Row"], None]]
"""Called with the cells to run and all cells; returns what is called with each row."""
WINDOW = 3600
"""Seconds over which the speed is taken, of which the time that is left follows."""


@contextmanager
def sweep_bar(stream: TextIO) -> Iterator[Begun]:
    """A bar of cells with the time that is left; silence in a pipe."""
    if not stream.isatty():
        yield lambda _todo, _all: lambda _row: silent(0)
        return
    screen = Screen(stream)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, speed_estimate_period=WINDOW) as live:

        def begun(todo: int, count: int) -> Callable[[Row], None]:
            task = live.add_task("Cells", total=count, completed=count - todo, failed="")
            failures = 0

            def told(row: Row) -> None:
                nonlocal failures
                if row.status == "failed":
                    failures += 1
                    screen.say(f"failed: {row.cell}: {row.reason}", "bold yellow")
                live.update(task, advance=1, failed=f"{failures} failed" if failures else "")

            return told

        yield begun
