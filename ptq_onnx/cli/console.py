"""What the command line shows: progress on stderr, tables on stdout, errors in one line."""

from __future__ import annotations

import atexit
import errno
import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from rich import box
from rich.table import Table

from ptq_onnx.cli.terminal import PIPE_WIDTH, Screen, plain, spell_what_is_missing, stdout
from ptq_onnx.errors import PtqError
from ptq_onnx.evaluation.outputs import MOST_DB
from ptq_onnx.files.file_names import printable
from ptq_onnx.progress import Progress
from ptq_onnx.report.next_steps import next_steps
from ptq_onnx.report.page_text import metric_text, truth_text
from ptq_onnx.runtime.installed import missing_runtime

if TYPE_CHECKING:
    from ptq_onnx.pipeline.result import Result

WORST = 15
"""How many ops the table of the worst ops shows."""
EXACT = "exact"
"""What stands for infinite dB."""

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of an interrupt and of a termination: 128 and the signal's number."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input as one line on stderr and exit code 2, an interrupt as 130; no tracebacks.

    A termination (SIGTERM) ends as an interrupt does, nothing half-made left, with 143. Log records
    and warnings of the libraries stay silent: what matters is in the report. What the terminal's
    encoding does not have is spelled in ASCII.
    """
    spell_what_is_missing()
    logging.getLogger().addHandler(logging.NullHandler())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    mine = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if mine else None
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
        code = TERMINATED if asked else INTERRUPTED
        atexit.register(_exit_interrupted, code)
        raise SystemExit(code) from None
    except OSError as error:
        if error.errno in (None, errno.EPIPE):
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        fail(f"{where}{error.strerror}.")
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def stay_done() -> None:
    """The work is done and written: a termination while Python takes itself apart, where no handler
    is called any more, makes no failure of it."""
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)


def _exit_interrupted(code: int) -> None:
    """Exit with ``code``, also where the interrupt came in code that ``exec`` compiled (as in an
    import of dataclasses): Python then kills itself with SIGINT, though it was handled."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    print("error:", printable(" ".join(message.split())), file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def progress_bars(stream: TextIO | None = None) -> Iterator[Progress | None]:
    """What :func:`ptq_onnx.quantize` takes as ``progress``; None (silence) in a pipe."""
    stream = stream or sys.stderr
    if not stream.isatty():
        with _warnings(Screen(stream, PIPE_WIDTH)):
            yield None
        return
    from ptq_onnx.cli.bars import Bars

    with Bars(stream) as bars, _warnings(bars.console):
        yield bars


@contextmanager
def _warnings(console: Screen) -> Iterator[None]:
    """What a run warns of, as soon as it does: it may not be worth its minutes. What the images
    are warned of is counted in the report."""

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.say(f"warning: {record.getMessage()}", "bold yellow")

    handler, logger = Shown(logging.WARNING), logging.getLogger("ptq_onnx.pipeline")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def show(result: Result) -> None:
    """Print the worst ops, a summary, the notes and the files of a quantization."""
    console, report = stdout(), result.report
    if report.get("analysis"):
        console.print(worst_ops(report["analysis"]))
        if report["analysis"].get("sensitivity"):
            console.print(costliest(report["analysis"]["sensitivity"]))
    if report.get("auto"):
        unit = "elements" if report["config"].get("target") == "qnn" else "operations"
        console.print(decisions(report["auto"], unit))
    warning = (report.get("preprocess_check") or {}).get("warning")
    if warning:
        console.say(f"warning: {warning}", "bold yellow")
    console.print(summary(report))
    for text in covered(report.get("coverage")):
        console.say(text)
    outputs = (report.get("fidelity") or {}).get("outputs") or []
    if len(outputs) > 1:
        console.print(outputs_table(outputs))
    for note in report.get("notes", ()):
        if note != warning:
            console.say(f"note: {note}")
    for purpose, command in next_steps(report, result.files):
        console.say(f"next, {purpose}: {command}")
    console.print("Written:")
    for path in result.files:
        console.say(f"  {path}")


def covered(coverage: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What runs in integers, and why the rest does not, one line each."""
    if coverage is None:
        return ()
    return coverage["line"], *(f"  {text}" for text in coverage["reasons"])


def worst_ops(analysis: Mapping[str, Any], count: int = WORST) -> Table:
    """The ops with the largest noise-to-signal ratio, worst first."""
    ops = sorted(analysis["ops"], key=lambda op: op["snr"], reverse=True)
    source = "held out" if analysis["held_apart"] else "of the calibration"
    title = f"Worst {min(count, len(ops))} of {len(ops)} ops, everything quantized at once, on"
    title += f" {analysis['images']} images {source}"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for name in ("role", "block", "op"):
        table.add_column(name, justify="right" if name == "block" else "left")
    table.add_column("SNR ratio\n(lower is better)", justify="right")
    table.add_column("dB\n(higher is better)", justify="right")
    for op in ops[:count]:
        block = "" if op["block"] is None else str(op["block"])
        found = EXACT if op["snr_db"] is None else f"{op['snr_db']:.1f}"
        cells = op["role"], block, op["op_type"], f"{op['snr']:.6f}", found
        table.add_row(*map(plain, cells))
    return table


def costliest(sensitivity: Mapping[str, Any], count: int = WORST) -> Table:
    """The modules that cost the logits most, of those measured on all images: quantized alone, and
    what is gained without them."""
    whole = "op", "all", sensitivity["images"]
    alone = [m for m in sensitivity["layerwise"] if (m["scope"], m["part"], m["images"]) == whole]
    alone = sorted(alone, key=lambda m: m["error"]["snr"], reverse=True)[:count]
    left = {m["module"]: m for m in sensitivity["leave_one_out"] if m["part"] == "all"}
    rows = []
    for one in alone:
        gain = left.get(one["module"], {}).get("gain_db")
        found = decibels(_measured(one["error"]["snr_db"]))
        rows.append((one["module"], found, "-" if gain is None else f"{gain:+.2f} dB"))
    table = simple_table(("module", "SQNR, it alone quantized", "gain, it alone in float"), rows)
    few, all_of_them = sensitivity["few_images"], sensitivity["images"]
    others = f" (the others: {few})" if few < all_of_them else ""
    table.title = f"Modules that cost most, on {all_of_them} images{others}"
    table.title_justify = "left"
    return table


def decisions(auto: Mapping[str, Any], unit: str = "operations") -> Table:
    """What ``--auto`` decided, and the file measured without each decision; ``unit``: of costs."""
    rows = [("", "nothing decided", "", "", *_closeness(auto["before"]))]
    for one in auto["decisions"]:
        cells = str(one["step"]), one["module"], one["decision"], f"{one['cost']:.3f}"
        rows.append((*cells, *_closeness(one["without"])))
    rows.append(("", "all", "", f"{auto['cost']:.2f} %", *_closeness(auto["after"])))
    names = ("step", "module", "decision", f"cost, M {unit}")
    table = simple_table((*names, "points lost without", "SQNR without"), rows)
    bound = "--max-drop" if auto["bound"] == "max_drop" else "--min-sqnr"
    table.title = f"Decisions of --auto, {bound} {auto['limit']:g}, on {auto['images']} images"
    table.title_justify = "left"
    return table


def _closeness(found: Mapping[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    drop = "-" if found["drop"] is None else f"{found['drop']:.1f}"
    return drop, decibels(_measured(found["sqnr_db"]))


def summary(report: Mapping[str, Any]) -> Table:
    """Size, and the accuracy against float where there were images to measure on."""
    accuracy, fidelity = report.get("accuracy"), report.get("fidelity")
    sizes = report["sizes"]
    rows = [("size", _megabytes(sizes["float"]), _megabytes(sizes["quantized"]))]
    if accuracy:
        several = len(accuracy.get("outputs") or ()) > 1
        for one in accuracy["outputs"] if several else [accuracy]:
            where = f" of '{one['name']}'" if several else ""
            for key, label in (("top1", "top-1"), ("top5", "top-5")):
                pair = one["float"].get(key), one["quantized"].get(key)
                if None not in pair:
                    name = f"{label}{where} of {accuracy['count']} images"
                    rows.append((name, percent(pair[0]), percent(pair[1])))
    metric = report.get("metric")
    if metric:
        name = f"{metric['figure']} of {metric['images']} images, {truth_text(metric['targets'])}"
        before, after = (metric_text(metric[k], metric["unit"]) for k in ("float_value", "value"))
        rows.append((name, before, after))
    if fidelity:
        images = "" if accuracy else f" on {on_images(fidelity)}"
        rows.append((f"{sqnr_title(fidelity)}{images}", "", decibels(fidelity["sqnr_db"])))
        if fidelity["agreement"] is not None:
            rows.append(("same top class as float", "", percent(fidelity["agreement"])))
    return simple_table(("", "float", "quantized"), rows)


OUTPUT_COLUMNS = ("SQNR", "cosine", "same class")


def output_cells(output: Mapping[str, Any]) -> tuple[str, ...]:
    """SQNR, cosine and share of equal top classes of one output, or what whole numbers have."""
    if output["equal"] is not None:
        return f"{output['equal']:.1f} % equal", "-", "-"
    cosine = "-" if output["cosine"] is None else f"{output['cosine']:.4f}"
    return decibels(output["sqnr_db"]), cosine, percent(output["agreement"])


def outputs_table(outputs: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each output of a model that has several."""
    rows = [(one["name"], _shape(one["shape"]), *output_cells(one)) for one in outputs]
    return simple_table(("output", "shape", *OUTPUT_COLUMNS), rows)


def _shape(shape: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def sqnr_title(fidelity: Mapping[str, Any]) -> str:
    """What the SQNR is of."""
    outputs = fidelity.get("outputs") or []
    if len(outputs) > 1:
        return "SQNR of the worst output"
    logits = fidelity["agreement"] is not None or not outputs
    return "SQNR of the logits" if logits else f"SQNR of '{outputs[0]['name']}'"


def on_images(fidelity: Mapping[str, Any]) -> str:
    """Which images a figure is of, in words."""
    kind = fidelity.get("source", "val")
    words = {"held apart": " held out from calibration", "calibration": " of the calibration"}
    words["noise"] = " of Gaussian noise"
    return f"{fidelity['images']} images{words.get(kind, '')}"


def simple_table(
    names: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False
) -> Table:
    """A table of text, its first column to the left, the others to the right unless they hold
    ``words``."""
    table = Table(box=box.SIMPLE)
    for index, name in enumerate(names):
        table.add_column(plain(name), justify="right" if index and not words else "left")
    for row in rows:
        table.add_row(*map(plain, row))
    return table


def percent(value: float | None) -> str:
    """``82.4 %``; a dash for what was not measured."""
    return "-" if value is None else f"{value:.1f} %"


def decibels(value: float | None) -> str:
    """``12.3 dB``; ``exact`` without any error, a dash for what was not measured."""
    if value is not None and value >= MOST_DB:
        return EXACT
    return "-" if value is None else f"{value:.1f} dB"


def _measured(value: float | None) -> float:
    """dB as a report holds them: null where there was no error."""
    return math.inf if value is None else value


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
