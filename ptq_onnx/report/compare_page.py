"""The comparison as one self-contained page without scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from ptq_onnx.analysis.comparison_results import Comparison, Contender
from ptq_onnx.evaluation.outputs import OutputFigures
from ptq_onnx.report.page_text import EXACT
from ptq_onnx.report.svg import line_chart
from ptq_onnx.report.templates import template

Column = tuple[str, Callable[[Contender], float | None], str, bool]
COLUMNS: tuple[Column, ...] = (
    ("Top-1, %", lambda c: c.top1, "{:.2f}", True),
    ("Top-5, %", lambda c: c.top5, "{:.2f}", True),
    ("SQNR, dB", lambda c: c.sqnr_db, "{:.1f}", True),
    ("Same class, %", lambda c: c.agreement, "{:.1f}", True),
    ("Size, MB", lambda c: c.bytes / 1e6, "{:.2f}", False),
    ("ms per image", lambda c: c.ms_per_image, "{:.1f}", False),
)
"""Title, value, format, and whether more is better."""


def render_comparison(found: Comparison) -> str:
    """The HTML page."""
    quantized = found.contenders[1:]
    numbers = sorted({b.block for c in quantized for b in c.blocks})
    by_block = [{b.block: b for b in c.blocks} for c in quantized]
    blocks = [(n, [_block(one.get(n)) for one in by_block]) for n in numbers]
    lines = {
        c.name: {
            b.block: b.snr_db for b in c.blocks if b.snr_db is not None and math.isfinite(b.snr_db)
        }
        for c in quantized
    }
    return template("compare.html").render(
        found=found,
        columns=[title for title, *_ in _columns(found)],
        rows=_rows(found),
        names=[c.name for c in quantized],
        blocks=blocks,
        outputs=_outputs(quantized),
        chart=Markup(line_chart(lines, "Block", "dB (higher is better)")),
    )


def _columns(found: Comparison) -> tuple[Column, ...]:
    """The columns, that of the metric first where one was asked for."""
    one = next((c.score for c in found.contenders if c.score is not None), None)
    if one is None:
        return COLUMNS

    def value(c: Contender) -> float | None:
        return one.float_value if c.score is None else c.score.value

    percent = one.unit == "%"
    title, text = (f"{one.figure}, %", "{:.2f}") if percent else (one.figure, "{:.4f}")
    return ((title, value, text, one.higher), *COLUMNS)


def _rows(found: Comparison) -> list[dict[str, Any]]:
    best: list[float | None] = []
    columns = _columns(found)
    for _, value, _, more in columns:
        known = [v for c in found.contenders[1:] if (v := value(c)) is not None]
        best.append((max if more else min)(known) if len(known) > 1 else None)
    rows = []
    for index, one in enumerate(found.contenders):
        cells = []
        for (_, value, text, _), top in zip(columns, best, strict=True):
            number = value(one)
            shown = "–" if number is None else text.format(number)
            shown = EXACT if number == math.inf else shown
            cells.append((shown, index > 0 and number is not None and number == top))
        ops = ", ".join(f"{kind} {count}" for kind, count in one.quantized_ops.items())
        rows.append({"name": one.name, "file": one.file, "cells": cells, "ops": ops or "none"})
    return rows


def _outputs(quantized: Sequence[Contender]) -> list[tuple[str, list[str]]]:
    """A row per output, where a model has several."""
    names = list(dict.fromkeys(o.name for c in quantized for o in c.outputs))
    if len(names) < 2:
        return []
    by_name = [{o.name: o for o in c.outputs} for c in quantized]
    return [(name, [_output(own.get(name)) for own in by_name]) for name in names]


def _output(one: OutputFigures | None) -> str:
    if one is None:
        return "–"
    if one.equal is not None:
        return f"{one.equal:.1f} % equal"
    return "–" if one.sqnr_db is None else f"{one.sqnr_db:.1f}"


def _block(one: Any) -> str:
    if one is None or one.snr_db is None:
        return "not found"
    shown = f"{one.snr_db:.1f}" if math.isfinite(one.snr_db) else EXACT
    return f"{shown}{'*' if one.how == 'position' else ''}"
