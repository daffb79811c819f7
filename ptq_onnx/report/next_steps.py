"""The commands that come next after a quantization, as they are to be typed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptq_onnx.config.names import RUNTIMES
from ptq_onnx.files.result_names import FLOAT, FORMED

FLOATS = (FLOAT, FORMED)
"""Float models among the files of a run."""


def next_steps(report: Mapping[str, Any], files: Sequence[Path]) -> list[tuple[str, str]]:
    """What for, and the command; none where no model was written.

    Accuracy first, where it was not measured: against labels if an output is [batch, classes].
    """
    models = [p for p in files if p.suffix == ".onnx" and p.name not in FLOATS]
    if not models:
        return []
    file, found = models[0], []
    floats = [p for p in files if p.name == FLOATS[0]]
    fidelity = report.get("fidelity") or {}
    if not report.get("accuracy") and not report.get("metric"):
        words = ["ptq-onnx", "evaluate", str(file)]
        if floats:
            words += ["--reference", str(floats[0])]
        classes = any(one["agreement"] is not None for one in fidelity.get("outputs") or [])
        if classes:
            text = shlex.join([*words, "--val"]) + " DIR --labels FILE"
            found.append(("accuracy on labelled images", text))
        elif fidelity.get("source") != "val":
            found.append(("on images of your own", shlex.join([*words, "--val"]) + " DIR"))
    target = str((report.get("config") or {}).get("target") or "onnxruntime")
    check = ["ptq-onnx", "check", str(file), "--target", target]
    found.append(("what the runtime makes of it", shlex.join(check)))
    if floats and target in RUNTIMES:
        words = ["ptq-onnx", "benchmark", str(floats[0]), str(file)]
        words += [] if target == "onnxruntime" else ["--runtime", target]
        found.append(("speed", shlex.join(words)))
    return found
