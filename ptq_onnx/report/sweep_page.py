"""A sweep as one self-contained page: what came of every cell, and which cells none betters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from ptq_onnx.report.scatter import Point, pareto, scatter
from ptq_onnx.report.templates import template

Rows = Sequence[Mapping[str, Any]]
SIZE, TOP1, SQNR = "Size of the file, MB", "Top-1, %", "SQNR, dB"
MOST_POINTS = 5000
"""Points of a plot; a browser draws no more at ease."""


def render_sweep(title: str, axes: Sequence[str], rows: Rows) -> str:
    """The HTML page of flat rows (see ``sweep.results``)."""
    done = [row for row in rows if row["status"] == "done"]
    varied = [axis for axis in axes if len({row[axis] for row in rows}) > 1]
    fixed = [(axis, rows[0][axis]) for axis in axes if axis not in varied]
    metric = "top1" if any(row["top1"] is not None for row in done) else "sqnr_db"
    plots, front = _plots(done, varied, metric)
    return template("sweep.html").render(
        scripts=True,
        title=title,
        axes=varied or list(axes[:2]),
        fixed=fixed,
        rows=[{**row, "link": _link(row), "front": row["cell"] in front} for row in rows],
        counts=Counter(row["status"] for row in rows),
        plots=plots,
        labelled=metric == "top1",
        seconds=sum(row["seconds"] or 0 for row in rows),
    )


def _plots(
    done: Rows, varied: Sequence[str], metric: str
) -> tuple[list[tuple[str, Markup]], set[str]]:
    """A plot of accuracy where there is one, and of SQNR; the cells on the front of the first."""
    plots, front = [], None
    for name, title in (("top1", TOP1), ("sqnr_db", SQNR)):
        known = [r for r in done if r[name] is not None and r["quantized_bytes"]][:MOST_POINTS]
        if not known:
            continue
        points = [_point(row, name, varied) for row in known]
        if front is None and name == metric:
            front = {known[i]["cell"] for i in pareto(points)}
        plots.append((title, Markup(scatter(points, SIZE, title))))
    return plots, front or set()


def _point(row: Mapping[str, Any], name: str, varied: Sequence[str]) -> Point:
    megabytes = row["quantized_bytes"] / 1e6
    place = " ".join(str(row[axis]) for axis in varied) or row["model"]
    unit = "%" if name == "top1" else "dB"
    told = f"{place}: {row[name]:.2f} {unit}, {megabytes:.2f} MB"
    kind = row["recipe"] if "recipe" in varied else row[varied[0]] if varied else row["model"]
    return Point(megabytes, row[name], kind, told, _link(row))


def _link(row: Mapping[str, Any]) -> str | None:
    """The report's address, relative to the page."""
    return None if row["report"] is None else quote(row["report"])
