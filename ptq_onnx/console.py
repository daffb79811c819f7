"""What the command line shows: progress on stderr, tables on stdout, errors in one line."""

from __future__ import annotations

import atexit
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ptq_onnx.errors import PtqError
from ptq_onnx.installed import missing_runtime

if TYPE_CHECKING:
    from ptq_onnx.result import Result

WORST = 15
"""How many ops the table of the worst ops shows."""
PIPE_WIDTH = 120
"""Columns where there is no terminal to ask."""

INTERRUPTED = 130
"""Exit code of an interrupt."""

Progress = Callable[[str, int], Callable[[int], None]]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input as one line on stderr and exit code 2, an interrupt as 130; no tracebacks.

    Log records and warnings of the libraries stay silent: what matters is in the report.
    """
    logging.getLogger().addHandler(logging.NullHandler())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    try:
        yield
    except PtqError as error:
        fail(str(error))
    except ImportError as error:
        told = missing_runtime(error)
        if told is None:
            raise
        fail(str(told))
    except KeyboardInterrupt:
        atexit.register(_exit_interrupted)
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        if error.errno == errno.EPIPE or error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}.")


def _exit_interrupted() -> None:
    """Exit with 130, also where the interrupt came in code that ``exec`` compiled (a dataclass, on
    import): Python then kills itself with SIGINT at its end, though the interrupt was handled."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def progress_bars(stream: TextIO | None = None) -> Iterator[Progress | None]:
    """What :func:`ptq_onnx.quantize` takes as ``progress``; None (silence) in a pipe."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Bars(*columns, TimeElapsedColumn(), console=Console(file=stream)) as bars:

        def start(stage: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(stage, total=total)
            return lambda done: bars.advance(task, done)

        yield start


def show(result: Result) -> None:
    """Print the worst ops, a summary, the notes and the files of a quantization."""
    console, report = stdout(), result.report
    if report.get("analysis"):
        console.print(worst_ops(report["analysis"]))
    if report.get("auto"):
        console.print(decisions(report["auto"]))
    console.print(summary(report))
    for note in report.get("notes", ()):
        console.print(Text(f"note: {note}"), soft_wrap=True)
    console.print("Written:")
    for path in result.files:
        console.print(Text(f"  {path}"), soft_wrap=True)


def stdout() -> Console:
    """The console of the results, wide enough for its tables in a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def worst_ops(analysis: Mapping[str, Any], count: int = WORST) -> Table:
    """The ops with the largest noise-to-signal ratio, worst first."""
    ops = sorted(analysis["ops"], key=lambda op: op["snr"], reverse=True)
    source = "held apart" if analysis["held_apart"] else "of the calibration"
    title = f"Worst {min(count, len(ops))} of {len(ops)} ops, everything quantized at once, on"
    title += f" {analysis['images']} images {source}"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for name in ("role", "block", "op"):
        table.add_column(name, justify="right" if name == "block" else "left")
    table.add_column("SNR ratio\n(lower is better)", justify="right")
    table.add_column("dB\n(higher is better)", justify="right")
    for op in ops[:count]:
        block = "" if op["block"] is None else str(op["block"])
        cells = op["role"], block, op["op_type"], f"{op['snr']:.6f}", f"{op['snr_db']:.1f}"
        table.add_row(*map(Text, cells))
    return table


def decisions(auto: Mapping[str, Any]) -> Table:
    """What ``--auto`` decided, and the file measured without each decision."""
    rows = [("", "nothing decided", "", "", *_closeness(auto["before"]))]
    for one in auto["decisions"]:
        cells = str(one["step"]), one["module"], one["decision"], f"{one['cost']:.3f}"
        rows.append((*cells, *_closeness(one["without"])))
    rows.append(("", "all", "", f"{auto['cost']:.2f} %", *_closeness(auto["after"])))
    names = ("step", "module", "decision", "cost, M operations")
    table = simple_table((*names, "points lost without", "SQNR without"), rows)
    bound = "--max-drop" if auto["bound"] == "max_drop" else "--min-sqnr"
    table.title = f"Decisions of --auto, {bound} {auto['limit']:g}, on {auto['images']} images"
    table.title_justify = "left"
    return table


def _closeness(found: Mapping[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    drop = "-" if found["drop"] is None else f"{found['drop']:.1f}"
    return drop, decibels(found["sqnr_db"])


def summary(report: Mapping[str, Any]) -> Table:
    """Size, and the accuracy against float where there were images to measure on."""
    accuracy, fidelity = report.get("accuracy"), report.get("fidelity")
    sizes = report["sizes"]
    rows = [("size", _megabytes(sizes["float"]), _megabytes(sizes["quantized"]))]
    if accuracy:
        for key, label in (("top1", "top-1"), ("top5", "top-5")):
            pair = accuracy["float"].get(key), accuracy["quantized"].get(key)
            if None not in pair:
                name = f"{label} of {accuracy['count']} images"
                rows.append((name, percent(pair[0]), percent(pair[1])))
    if fidelity:
        rows.append(("SQNR of the logits", "", decibels(fidelity["sqnr_db"])))
        rows.append(("same top class as float", "", percent(fidelity["agreement"])))
    return simple_table(("", "float", "quantized"), rows)


def simple_table(
    names: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False
) -> Table:
    """A table of text, its first column to the left, the others to the right unless they hold
    ``words``."""
    table = Table(box=box.SIMPLE)
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index and not words else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def percent(value: float | None) -> str:
    """``82.4 %``; a dash for what was not measured."""
    return "-" if value is None else f"{value:.1f} %"


def decibels(value: float | None) -> str:
    """``12.3 dB``; a dash for what was not measured."""
    return "-" if value is None else f"{value:.1f} dB"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
