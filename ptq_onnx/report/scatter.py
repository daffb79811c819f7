"""Many results as points, two figures each, and the front of those that none betters in both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ptq_onnx.files.file_names import in_html
from ptq_onnx.report.svg import LINE_COLORS
from ptq_onnx.report.svg_parts import LEFT, TOP, drawing, line, text, upright

WIDE, HEIGHT, LEGEND = 760, 380, 190
TICKS = 6


@dataclass(frozen=True)
class Point:
    """A result: ``x`` (less is better), ``y`` (more is better), the ``kind`` that gives it its
    colour, what is told of it, and where it leads to."""

    x: float
    y: float
    kind: str
    told: str
    link: str | None = None


def pareto(points: Sequence[Point]) -> list[int]:
    """The points than which none is smaller and better, or one of the two and equal in the other,
    by ascending x; of equal points the first."""
    order = sorted(range(len(points)), key=lambda i: (points[i].x, -points[i].y, i))
    front, best = [], -math.inf
    for index in order:
        if points[index].y > best:
            front.append(index)
            best = points[index].y
    return front


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from below ``low`` to above ``high``, some six of them."""
    span = max(high - low, 1e-9 * max(abs(low), abs(high), 1))
    raw = span / (TICKS - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(s for s in (1, 2, 2.5, 5, 10) if s * power >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(step * i, 10) for i in range(first, last + 1)]


def scatter(points: Sequence[Point], across: str, up: str) -> str:
    """The points as SVG, coloured by kind, with a legend on the right and the front as a line."""
    kinds = list(dict.fromkeys(point.kind for point in points))
    marks_x = ticks(min(p.x for p in points), max(p.x for p in points))
    marks_y = ticks(min(p.y for p in points), max(p.y for p in points))
    inner, tall = WIDE - LEFT - LEGEND, HEIGHT - TOP - 40

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - marks_x[0]) / (marks_x[-1] - marks_x[0]) * inner,
            TOP + (marks_y[-1] - y) / (marks_y[-1] - marks_y[0]) * tall,
        )

    body = []
    for mark in marks_y:
        _, y = place(marks_x[0], mark)
        body.append(line(LEFT, y, WIDE - LEGEND, y, ' stroke-opacity=".25"'))
        body.append(text(LEFT - 5, y + 4, f"{mark:g}", "end"))
    for mark in marks_x:
        x, _ = place(mark, marks_y[0])
        body.append(text(x, HEIGHT - 24, f"{mark:g}"))
    body.append(text(LEFT + inner / 2, HEIGHT - 6, across))
    body.append(upright(up, TOP + tall / 2))
    front = pareto(points)
    steps = [place(points[i].x, points[i].y) for i in front]
    path = f"M{steps[0][0]:.1f} {steps[0][1]:.1f}"
    path += "".join(f"H{x:.1f}V{y:.1f}" for x, y in steps[1:]) + f"H{WIDE - LEGEND}"
    body.append(f'<path d="{path}" class="front" fill="none" stroke="currentColor"/>')
    for index, point in enumerate(points):
        x, y = place(point.x, point.y)
        color = LINE_COLORS[kinds.index(point.kind) % len(LINE_COLORS)]
        ring = ' stroke="currentColor" stroke-width="2"' if index in front else ""
        dot = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}" fill-opacity=".75"{ring}>'
            f"<title>{in_html(point.told)}</title></circle>"
        )
        body.append(dot if point.link is None else f'<a href="{in_html(point.link)}">{dot}</a>')
    for index, kind in enumerate(kinds):
        y = TOP + 10 + 18 * index
        color = LINE_COLORS[index % len(LINE_COLORS)]
        body.append(f'<circle cx="{WIDE - LEGEND + 22}" cy="{y - 4}" r="5" fill="{color}"/>')
        shown = kind if len(kind) < 24 else f"{kind[:22]}…"
        body.append(text(WIDE - LEGEND + 34, y, shown, "start"))
    told = f"{len(points)} points, {len(front)} of them on the front: " + "; ".join(
        points[i].told for i in front[:12]
    )
    return drawing("".join(body), WIDE, HEIGHT, f"{up} over {across}", told)
