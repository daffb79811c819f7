"""The command that repeats a run, and those that come after it, as they are to be typed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ptq_onnx.config.metric_options import is_own
from ptq_onnx.files.result_names import CONFIG, FLOAT, QUANTIZED, REPORT
from ptq_onnx.report.next_steps import next_steps

Entry = Mapping[str, Any]

IN_PYTHON = ("arrays", "pictures", "a list of files")
"""Sources of images that no option can name."""


@dataclass(frozen=True)
class Invocation:
    """Paths of the run as its user named them, below the working directory where they lie there;
    None for what was not given, or is no path. ``folder``: of the reports; ``written``: the
    quantized file, None where only reports were written."""

    command: Literal["quantize", "analyse"]
    model: str
    calib: str | None
    val: str | None
    labels: str | None
    targets: str | None
    scales: str | None
    folder: str
    written: str | None


def named(path: object) -> str | None:
    """A path that can be typed in the working directory, of an opened folder too; None for what
    has none."""
    if not getattr(path, "listed", True):
        path = getattr(path, "root", None)
    if not isinstance(path, str | Path):
        return None
    real, here = Path(os.path.abspath(path)), Path.cwd()
    inside = real != here and real.is_relative_to(here)
    text = str(real.relative_to(here) if inside else path)
    return text.encode("utf-8", "replace").decode("utf-8")


def command(report: Entry, *more: str, name: str | None = None) -> list[str]:
    """The words that repeat the run, into a folder beside its own; ``more`` come last. ``name``:
    another command than the run's.

    Of reports without ``invocation`` from the names that they hold.
    """
    run = report.get("invocation") or _by_names(report)
    folder = run["folder"]
    words = ["ptq-onnx", name or run["command"], run["model"]]
    words += ["--config", os.path.join(folder, CONFIG)]
    if run["scales"] is not None:
        words += ["--scales", run["scales"]]
    elif in_python(report):
        words += ["--calib", "calib"]
    for option in ("calib", "val", "labels", "targets"):
        if run.get(option) is not None:
            words += [f"--{option}", run[option]]
    config = report.get("config") or {}
    if is_own(config.get("metric")):  # in no file of options
        words += ["--metric", config["metric"]]
        words += [w for o in config.get("metric_option") or () for w in ("--metric-option", o)]
    words += more
    return [*words, "--output", f"{folder.rstrip('/')}-again"] if folder else words


def in_python(report: Entry) -> bool:
    """Whether calibration had images that no option can name."""
    source = (report.get("calibration") or {}).get("source")
    return source in IN_PYTHON and not (report.get("invocation") or {}).get("calib")


def following(report: Entry) -> dict[str, str]:
    """The commands that come next, by what for; none where no model was written."""
    run = report.get("invocation") or _by_names(report)
    if run["written"] is None:
        return {}
    files = [Path(run["folder"], FLOAT), Path(run["written"])]
    return dict(next_steps(report, files))


def _by_names(report: Entry) -> dict[str, Any]:
    calibration, measured = report.get("calibration") or {}, report.get("validation") or {}
    source = calibration.get("source")
    reused = calibration.get("images") == 0
    tested = measured.get("source") not in (None, *IN_PYTHON)
    return {
        "command": "quantize",
        "model": str((report.get("model") or {}).get("path") or "model.onnx"),
        "calib": None if reused or source in IN_PYTHON else str(source or "calib"),
        "val": str(measured["source"]) if tested else None,
        "labels": str(measured["labels"]) if tested and measured.get("labels") else None,
        "scales": REPORT if reused else None,
        "folder": "",
        "written": QUANTIZED,
    }


def typed(words: list[str]) -> str:
    """One line for a shell."""
    return shlex.join(words)
