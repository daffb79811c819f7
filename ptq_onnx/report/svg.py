"""Small static charts as SVG text, in the page's own colours (currentColor, CSS variables).

They need no script, look the same in print, and take a few kilobytes each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex
from numpy.typing import NDArray

from ptq_onnx.analysis.attention_results import BlockAttention
from ptq_onnx.analysis.variation_results import ChannelRanges
from ptq_onnx.files.file_names import in_html
from ptq_onnx.report.svg_parts import BOTTOM, LEFT, RIGHT, TOP
from ptq_onnx.report.svg_parts import drawing as _svg
from ptq_onnx.report.svg_parts import line as _line
from ptq_onnx.report.svg_parts import text as _text
from ptq_onnx.report.svg_parts import upright as _up

WIDTH = 460
"""Of a drawing that takes half a screen, or the whole of a phone's: its text stays legible."""


def heat_color(decibels: float, low: float, high: float) -> str:
    """From red (``low``: bad) over yellow to green, as a CSS colour."""
    share = 0.0 if high <= low else min(max((decibels - low) / (high - low), 0.0), 1.0)
    return f"hsl({130 * share:.0f} 65% {72 - 14 * abs(share - 0.5):.0f}%)"


def heat_map(
    values: Mapping[tuple[str, int], float],
    rows: Sequence[str],
    blocks: int,
    label: str,
    limits: tuple[float, float] | None = None,
    text: Callable[[float], str] = lambda v: f"{v:.0f}" if math.isfinite(v) else "∞",
    bad_is_high: bool = False,
) -> str:
    """Roles across, blocks down, so that any depth fits a phone; each cell holds its figure on
    the colour of it: green where the figure is high, or where it is low with ``bad_is_high``."""
    known = [v for v in values.values() if math.isfinite(v)]
    low, high = limits or (min(known, default=0.0), max(known, default=1.0))
    if bad_is_high:
        low, high = -high, -low
    wide, tall, left, top = 27, 19, 42, 62
    middle = top + blocks * tall / 2
    body = [_up("block", middle), _text(left + len(rows) * wide / 2, 10, "role")]
    body += [_text(left - 6, top + (b + 0.5) * tall + 4, str(b), "end") for b in range(blocks)]
    for index, role in enumerate(rows):
        x = left + index * wide
        turn = f' transform="rotate(-55 {x + wide / 2:.1f} {top - 5})"'
        body.append(_text(x + wide / 2, top - 5, role, "start", turn))
        for block in range(blocks):
            value = values.get((role, block))
            if value is None:
                continue
            y = top + block * tall
            color = heat_color(-value if bad_is_high else value, low, high)
            body.append(
                f'<rect x="{x}" y="{y}" width="{wide - 1}" height="{tall - 1}"'
                f' fill="{color}"><title>blocks.{block}.{in_html(role)}:'
                f" {f'{value:.2f} dB' if math.isfinite(value) else 'exact'}</title></rect>"
            )
            body.append(
                _text(x + wide / 2 - 0.5, y + 13, text(value), extra=' fill="#111" font-size="10"')
            )
    told = f"Roles across, blocks down; figures in dB from {min(known, default=0.0):.1f} to"
    told += f" {max(known, default=0.0):.1f}."
    width = left + max(len(rows), 4) * wide + 30
    return _svg("".join(body), width, top + 4 + blocks * tall, label, told)


def channel_bands(found: ChannelRanges) -> str:
    """Smallest and largest value of every channel (FQ-ViT, figure 1): a bar per channel."""
    height, count = 160, len(found.low)
    low, high = min(*found.low, 0.0), max(*found.high, 0.0)
    span = max(high - low, 1e-30)
    inner, tall = WIDTH - LEFT - RIGHT, height - TOP - BOTTOM

    def y(value: float) -> float:
        return TOP + (high - value) / span * tall

    step = inner / max(count, 1)
    points = "".join(
        f"M{LEFT + (i + 0.5) * step:.1f} {y(found.low[i]):.1f}V{y(found.high[i]):.1f}"
        for i in range(count)
    )
    body = [
        f'<path d="{points}" class="band" fill="none" stroke-width="{max(step * 0.9, 0.6):.2f}"/>',
        _line(LEFT, y(0), WIDTH - RIGHT, y(0)),
        _up("value (no unit)", TOP + tall / 2),
        _text(LEFT - 4, y(high) + 8, f"{high:.3g}", "end"),
        _text(LEFT - 4, y(low), f"{low:.3g}", "end"),
        _text(LEFT, height - 20, "0", "start"),
        _text(WIDTH - RIGHT, height - 20, str(count - 1), "end"),
        _text(LEFT + inner / 2, height - 6, "channel (number)"),
    ]
    told = f"{count} channels; values from {low:.3g} to {high:.3g}; the median channel reaches"
    told += f" {found.box[2]:.3g}, the largest {found.box[4]:.3g}."
    title = f"Smallest and largest value of each channel that {found.reader} reads"
    return _svg("".join(body), WIDTH, height, title, told)


def box_plot(found: Sequence[ChannelRanges], wide: float = 900) -> str:
    """Box per LayerNorm input over its channels' largest |x|, on a log axis."""
    height, below = 270, 76
    inner, tall = wide - LEFT - RIGHT, height - TOP - below
    values = [v for one in found for v in one.box if v > 0]
    low = math.floor(math.log10(min(values, default=1.0)))
    high = math.ceil(math.log10(max(values, default=10.0)))
    high = max(high, low + 1)

    def y(value: float) -> float:
        exponent = math.log10(max(value, 10.0**low))
        return TOP + (high - exponent) / (high - low) * tall

    body = [
        _up("largest |x| of a channel (no unit)", TOP + tall / 2),
        _text(LEFT + inner / 2, height - 5, "LayerNorm that reads the tensor (block.norm)"),
    ]
    for exponent in range(low, high + 1):
        at = y(10.0**exponent)
        body.append(_line(LEFT, at, wide - RIGHT, at, ' stroke-opacity=".25"'))
        body.append(_text(LEFT - 4, at + 4, f"{10.0**exponent:g}", "end"))
    step = inner / max(len(found), 1)
    for index, one in enumerate(found):
        x, half = LEFT + (index + 0.5) * step, min(step * 0.32, 10)
        least, first, median, third, most = map(y, one.box)
        body.append(
            f"<g><title>{in_html(one.reader)}: median {one.box[2]:.3g}, largest {one.box[4]:.3g}"
            f"</title>{_line(x, least, x, first)}{_line(x, third, x, most)}"
            f'<rect x="{x - half:.1f}" y="{third:.1f}" width="{2 * half:.1f}"'
            f' height="{max(first - third, 1):.1f}" class="box"/>'
            f"{_line(x - half, median, x + half, median)}"
            f'<circle cx="{x:.1f}" cy="{most:.1f}" r="2.5" class="mark"/></g>'
        )
        at = height - below + 14
        place = f' transform="rotate(-60 {x:.1f} {at})" font-size="9"'
        body.append(_text(x + 4, at, one.reader.removeprefix("blocks."), "end", place))
    worst = max(found, key=lambda one: one.box[4], default=None)
    told = "A box per LayerNorm over its channels: quartiles, whiskers to the extremes."
    if worst is not None:
        told += f" The largest channel, {worst.box[4]:.3g}, is read by {worst.reader}."
    return _svg(
        "".join(body), wide, height, "Largest |x| of the channels of LayerNorm inputs", told
    )


def attention_levels(found: BlockAttention, bits: int = 4) -> str:
    """Histogram of attention values (log2 axis), uniform levels above, log2 levels below."""
    height = 214
    inner, tall = WIDTH - LEFT - RIGHT, height - 86
    lowest, counts = found.lowest, found.counts
    total = sum(counts) or 1
    top = max(counts, default=1) or 1

    def x(exponent: float) -> float:
        return LEFT + (exponent - lowest) / -lowest * inner

    body = []
    base = 20 + tall
    for index, count in enumerate(counts):
        a = lowest + index * -lowest / len(counts)
        b = lowest + (index + 1) * -lowest / len(counts)
        size = count / top * tall
        body.append(
            f'<rect x="{x(a):.1f}" y="{base - size:.1f}" width="{x(b) - x(a) - 0.5:.1f}"'
            f' height="{size:.1f}" class="bars"><title>{count} values from 2^{a:g} to 2^{b:g}'
            "</title></rect>"
        )
    body.append(_line(LEFT, base, WIDTH - RIGHT, base))
    for share in (0.0, 0.5, 1.0):
        body.append(
            _text(LEFT - 4, base - share * tall + 4, f"{100 * share * top / total:.1f}", "end")
        )
    body.append(_up("share of values, %", 20 + tall / 2))
    steps = (1 << bits) - 1
    for step in range(1, steps + 1):
        at = x(math.log2(step / steps))
        body.append(f'<path d="M{at:.1f} 6V{base}" class="uniform"/>')
    for exponent in range(0, max(lowest, 1 - steps) - 1, -1):
        at = x(exponent)
        body.append(f'<path d="M{at:.1f} {base}v10" class="log2"/>')
    for exponent in range(lowest, 1, 4):
        anchor = "end" if exponent == 0 else "middle"
        body.append(_text(x(exponent), base + 24, f"2^{exponent}" if exponent else "1", anchor))
    body.append(_text(LEFT + inner / 2, base + 40, "attention weight, 0 to 1 (logarithmic axis)"))
    body.append(_text(LEFT, base + 57, f"{bits} bits: dashed red, uniform levels (from 1/{steps});"
                      " green ticks, log2 levels", "start"))  # fmt: skip
    under = sum(counts[: max(0, round((-math.log2(2 * steps) - lowest) * len(counts) / -lowest))])
    told = (
        f"{100 * under / total:.0f} % of the values are below half a step of {bits} uniform bits."
    )
    title = f"How often attention weights of block {found.block} occur, with the levels of codes"
    return _svg("".join(body), WIDTH, height, title, told)


MAP_SHARE = 95.0
"""Percentile of a map's weights that gets the brightest colour: a few corner tokens that draw
all attention must not leave the rest dark."""


def map_limit(*maps: NDArray[Any]) -> float:
    """The weight that gets the brightest colour; where that is 0, the largest, or 1."""
    values = np.concatenate([np.asarray(m, np.float64).ravel() for m in maps])
    return float(np.percentile(values, MAP_SHARE)) or float(values.max()) or 1.0


def rollout_maps(maps: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Maps side by side in one colour scale, which ends at their :data:`MAP_SHARE` percentile."""
    size, gap = 200.0, 20.0
    body = []
    height = size
    top = map_limit(*(np.array(rows) for rows in maps.values()))
    colors = mpl.colormaps["inferno"]
    for index, (label, rows) in enumerate(maps.items()):
        cell = size / max(len(rows[0]), 1)
        height = cell * len(rows)
        left = index * (size + gap)
        body.append(_text(left + size / 2, 12, label))
        body.extend(
            f'<rect x="{left + c * cell:.2f}" y="{18 + r * cell:.2f}" width="{cell + 0.05:.2f}"'
            f' height="{cell + 0.05:.2f}" fill="{to_hex(colors(min(v / top, 1.0)))}"'
            ' shape-rendering="crispEdges"/>'
            for r, row in enumerate(rows)
            for c, v in enumerate(row)
        )
    width = len(maps) * (size + gap) - gap
    body.append(_text(width / 2, height + 34, "patches of the image, left to right, top to bottom"))
    told = f"Maps of {' and '.join(maps)}; colours from 0 to {top:.3g}, percentile {MAP_SHARE:g}."
    return _svg("".join(body), width, height + 42, "Attention rollout", told)


LINE_COLORS = ("#d9403a", "#3a7fc4", "#2a9134", "#b57700", "#9467bd", "#0f8f9e", "#808080")
"""Each at least 3 times as light, or as dark, as a dark or a white page."""


def line_chart(
    lines: Mapping[str, Mapping[int, float]], across: str, up: str, unit: str = ""
) -> str:
    """One line per name over whole numbers, with a legend on the right."""
    wide, height, right = 640, 280, 150
    inner, tall = wide - LEFT - right, height - TOP - 40
    points = [(x, y) for line in lines.values() for x, y in line.items()]
    first, last = min((x for x, _ in points), default=0), max((x for x, _ in points), default=1)
    low = min(0.0, 5 * math.floor(min((y for _, y in points), default=0.0) / 5))
    high = max(5 * math.ceil(max((y for _, y in points), default=5.0) / 5), low + 5)
    step = 5 if high - low <= 60 else 20

    def place(x: float, y: float) -> tuple[float, float]:
        share = (x - first) / max(last - first, 1)
        return LEFT + share * inner, TOP + (high - y) / (high - low) * tall

    body = []
    for value in range(int(low), int(high) + 1, step):
        _, y = place(first, value)
        body.append(_line(LEFT, y, wide - right, y, ' stroke-opacity=".25"'))
        body.append(_text(LEFT - 5, y + 4, f"{value}{unit}", "end"))
    for number in range(first, last + 1):
        x, _ = place(number, low)
        body.append(_text(x, height - 24, str(number)))
    body.append(_text(LEFT + inner / 2, height - 6, across))
    body.append(
        _text(12, TOP + tall / 2, up, extra=f' transform="rotate(-90 12 {TOP + tall / 2})"')
    )
    for index, (name, line) in enumerate(lines.items()):
        color = LINE_COLORS[index % len(LINE_COLORS)]
        at = [place(x, y) for x, y in sorted(line.items())]
        path = "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(at))
        body.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        body.extend(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in at)
        y = TOP + 10 + 16 * index
        body.append(
            f'<rect x="{wide - right + 12}" y="{y - 8}" width="12" height="8" fill="{color}"/>'
        )
        body.append(
            _text(wide - right + 30, y, name if len(name) < 20 else f"{name[:18]}…", "start")
        )
    told = f"Lines of {', '.join(lines)} from {low:g} to {high:g}."
    return _svg("".join(body), wide, height, f"{up} over {across}", told)
