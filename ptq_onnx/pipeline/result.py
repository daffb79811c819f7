"""What a quantization gives back, and how a prompt or a notebook shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq_onnx.files.file_names import in_html
from ptq_onnx.files.result_names import PAGE
from ptq_onnx.report.page_text import metric_text

if TYPE_CHECKING:
    from ptq_onnx.analysis.results import Analysis

COLOURS = {"good": "#2e7d32", "fair": "#b26a00", "bad": "#c62828"}
"""Of the line beside the verdict, by its grade."""


@dataclass(frozen=True, repr=False)
class Result:
    """What :func:`ptq_onnx.quantize` made: the report (also in report.json) and the files.

    ``output``: the folder of the reports. ``analysis``: its measurements as dataclasses; None
    with ``report=False``. ``model``: the quantized file; None where only reports were written.
    """

    report: dict[str, Any]
    output: Path
    files: tuple[Path, ...]
    analysis: Analysis | None = None
    model: Path | None = None

    @property
    def page(self) -> Path | None:
        """The report as a page, if there is one."""
        return next((path for path in self.files if path.name == PAGE), None)

    def __repr__(self) -> str:
        figures = [f"{name} {value}" for name, value in _figures(self.report)]
        notes = len(self.report.get("notes", ()))
        if notes:
            figures.append(f"{notes} note{'s' * (notes > 1)}")
        return f"Result({self.model or self.output}: {', '.join(figures)})"

    def _repr_html_(self) -> str:
        """For notebooks: the verdict, the figures, the notes and a link to the page."""
        from ptq_onnx.report.page import verdict

        grade, text = verdict(self.report)
        colour = COLOURS.get(grade, "#777")
        rows = "".join(
            f"<tr><th style='text-align:left'>{in_html(name)}</th>"
            f"<td style='text-align:left'>{in_html(value)}</td></tr>"
            for name, value in (("file", str(self.model or "none")), *_figures(self.report))
        )
        notes = "".join(f"<li>{in_html(note)}</li>" for note in self.report.get("notes", ()))
        link = ""
        if self.page is not None:
            path = self.page.as_posix()
            link = f"<p><a href='{in_html(path)}'>{in_html(path)}</a></p>"
        return (
            f"<div><p style='border-left:4px solid {colour};padding-left:.6em'>"
            f"{in_html(text)}</p><table>{rows}</table>"
            + (f"<ul>{notes}</ul>" if notes else "")
            + f"{link}</div>"
        )


def _figures(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what was measured: size, top-1, SQNR, agreement."""
    found = []
    sizes = report.get("sizes") or {}
    if sizes.get("quantized"):
        before, after = sizes["float"] / 1e6, sizes["quantized"] / 1e6
        found.append(("size", f"{before:.2f} → {after:.2f} MB"))
    accuracy, fidelity = report.get("accuracy") or {}, report.get("fidelity") or {}
    metric = report.get("metric")
    if metric is not None:
        before, after = (metric_text(metric[k], metric["unit"]) for k in ("float_value", "value"))
        found.append((metric["figure"], f"{before} → {after}"))
    top1 = [(accuracy.get(kind) or {}).get("top1") for kind in ("float", "quantized")]
    if None not in top1:
        found.append(("top-1", f"{top1[0]:.1f} → {top1[1]:.1f} %"))
    for key, name, unit in (("sqnr_db", "SQNR", "dB"), ("agreement", "same class", "%")):
        value = fidelity.get(key)
        if value is not None and math.isfinite(value):
            found.append((name, f"{value:.1f} {unit}"))
    return found
