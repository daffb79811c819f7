"""What to do next, for the page: what the measurements say, then commands ready to be typed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptq_onnx.report.reproduce import command, following, typed

Entry = Mapping[str, Any]
Suggestion = tuple[str, str]
"""A sentence, and a command, or nothing."""

NOTHING = (
    "No tensor stands out: in none does one channel ask for a scale of its own, and in none is the"
    " error mostly clipped values. Nothing needs to be done."
)
STEPS = {
    "accuracy on labelled images": "Accuracy needs labelled images:",
    "on images of your own": "On images of your own:",
    "what the runtime makes of it": "To see what the runtime computes in integers:",
    "speed": "To know the speed-up on this machine, time both files side by side:",
}
"""By what :func:`ptq_onnx.report.next_steps.next_steps` calls them."""


def suggestions(report: Entry, grade: str) -> list[Suggestion]:
    """Sentences with their commands, the most urgent first. ``grade``: of the verdict."""
    config, analysis = report.get("config") or {}, report.get("analysis") or {}
    if not config and not analysis:
        return []
    found: list[Suggestion] = [(text, "") for text in analysis.get("advice") or []]
    if not found and analysis.get("variation") is not None:
        found.append((NOTHING, "") if grade == "good" else (_inherited(analysis), ""))
    if grade in ("fair", "bad"):
        found += _remedies(report, config)
    if analysis and analysis.get("sensitivity") is None:
        again = typed(command(report, name="analyse"))
        found.append(("To see what each module costs by itself, and gives back in float:", again))
    return [*found, *((STEPS.get(what, what), line) for what, line in following(report).items())]


def _inherited(analysis: Entry) -> str:
    """Where the error is, when no tensor by itself explains it."""
    ops = [op for op in analysis.get("ops") or [] if op["snr"]]
    worst = max(ops, key=lambda op: op["snr"], default=None)
    where = "" if worst is None else f"; the worst op is {place(worst)}, {worst['snr_db']:.1f} dB"
    return f"No tensor by itself explains the error: it adds up from op to op{where}."


def _remedies(report: Entry, config: Entry) -> list[Suggestion]:
    """Options that bound the loss, where this run did not have them."""
    found: list[Suggestion] = []
    if config.get("target") != "integer":
        if config.get("quantizer") != "deploy":
            again = typed(command(report, "--quantizer", "deploy"))
            found.append(
                ("deploy quantizes only the products, after equalisation, and loses least:", again)
            )
        scales = (report.get("invocation") or {}).get("scales")
        if not config.get("auto") and scales is None:
            again = typed(command(report, "--auto", name="quantize"))
            found.append(("To leave as few ops in float as a bound on the loss takes:", again))
    return found


def place(op: Entry) -> str:
    """``blocks.5.fc2``, or the role of what is in no block."""
    return str(op["role"]) if op["block"] is None else f"blocks.{op['block']}.{op['role']}"
