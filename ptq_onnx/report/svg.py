"""Small static charts as SVG text, in the page's own colours (currentColor, CSS variables).

They need no script, look the same in print, and take a few kilobytes each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ptq_onnx.analysis.results import BlockAttention, ChannelRanges
from ptq_onnx.files.file_names import in_html

WIDTH = 640
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 10, 30


def _svg(body: str, width: float, height: float, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{in_html(label)}"'
        f' font-size="11" fill="currentColor">{body}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{in_html(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="axis"{style}/>'


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
    """Blocks across, roles down; each cell holds its figure on the colour of it: green where
    the figure is high, or where it is low with ``bad_is_high``."""
    known = [v for v in values.values() if math.isfinite(v)]
    low, high = limits or (min(known, default=0.0), max(known, default=1.0))
    if bad_is_high:
        low, high = -high, -low
    wide, tall = max(26, min(46, 560 / max(blocks, 1))), 20
    body = [
        _text(70 + (b + 0.5) * wide, 12, str(b)) for b in range(blocks)
    ]  # the row of block numbers
    for index, role in enumerate(rows):
        y = 18 + index * tall
        body.append(_text(64, y + 14, role, "end"))
        for block in range(blocks):
            value = values.get((role, block))
            if value is None:
                continue
            x = 70 + block * wide
            color = heat_color(-value if bad_is_high else value, low, high)
            body.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide - 1:.1f}" height="{tall - 1}"'
                f' fill="{color}"><title>blocks.{block}.{in_html(role)}:'
                f" {f'{value:.2f} dB' if math.isfinite(value) else 'exact'}</title></rect>"
            )
            body.append(
                _text(x + wide / 2 - 0.5, y + 14, text(value), extra=' fill="#111" font-size="10"')
            )
    return _svg("".join(body), 78 + blocks * wide, 24 + len(rows) * tall, label)


def channel_bands(found: ChannelRanges) -> str:
    """Smallest and largest value of every channel (FQ-ViT, figure 1): a bar per channel."""
    height, count = 150, len(found.low)
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
        _text(LEFT - 4, y(high) + 8, f"{high:.3g}", "end"),
        _text(LEFT - 4, y(low), f"{low:.3g}", "end"),
        _text(LEFT, height - 8, "channel 0", "start"),
        _text(WIDTH - RIGHT, height - 8, str(count - 1), "end"),
    ]
    return _svg("".join(body), WIDTH, height, f"Channel ranges of {found.reader}'s input")


def box_plot(found: Sequence[ChannelRanges]) -> str:
    """Box per LayerNorm input over its channels' largest |x|, on a log axis."""
    height = 250
    inner, tall = WIDTH - LEFT - RIGHT, height - TOP - 62
    values = [v for one in found for v in one.box if v > 0]
    low = math.floor(math.log10(min(values, default=1.0)))
    high = math.ceil(math.log10(max(values, default=10.0)))
    high = max(high, low + 1)

    def y(value: float) -> float:
        exponent = math.log10(max(value, 10.0**low))
        return TOP + (high - exponent) / (high - low) * tall

    body = []
    for exponent in range(low, high + 1):
        at = y(10.0**exponent)
        body.append(_line(LEFT, at, WIDTH - RIGHT, at, ' stroke-opacity=".25"'))
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
        place = f' transform="rotate(-60 {x:.1f} {height - 46})" font-size="9"'
        body.append(_text(x, height - 46, one.reader.removeprefix("blocks."), "end", place))
    return _svg("".join(body), WIDTH, height, "Largest |x| of the channels of LayerNorm inputs")


def attention_levels(found: BlockAttention, bits: int = 4) -> str:
    """Histogram of attention values (log2 axis), uniform levels above, log2 levels below."""
    height = 190
    inner, tall = WIDTH - LEFT - RIGHT, height - 62
    lowest, counts = found.lowest, found.counts
    top = max(counts, default=1) or 1

    def x(exponent: float) -> float:
        return LEFT + (exponent - lowest) / -lowest * inner

    body = []
    for index, count in enumerate(counts):
        a = lowest + index * -lowest / len(counts)
        b = lowest + (index + 1) * -lowest / len(counts)
        size = count / top * tall
        body.append(
            f'<rect x="{x(a):.1f}" y="{20 + tall - size:.1f}" width="{x(b) - x(a) - 0.5:.1f}"'
            f' height="{size:.1f}" class="bars"><title>{count} values from 2^{a:g} to 2^{b:g}'
            "</title></rect>"
        )
    base = 20 + tall
    body.append(_line(LEFT, base, WIDTH - RIGHT, base))
    steps = (1 << bits) - 1
    for step in range(1, steps + 1):
        at = x(math.log2(step / steps))
        body.append(f'<path d="M{at:.1f} 6V{base}" class="uniform"/>')
    for exponent in range(0, max(lowest, 1 - steps) - 1, -1):
        at = x(exponent)
        body.append(f'<path d="M{at:.1f} {base}v10" class="log2"/>')
    for exponent in range(lowest, 1, 4):
        anchor = "end" if exponent == 0 else "middle"
        body.append(_text(x(exponent), base + 24, f"2^{exponent}", anchor))
    body.append(_text(LEFT, base + 38, f"{bits} bits: uniform levels (from 1/{steps}) | log2 levels"
                      " (ticks below)", "start"))  # fmt: skip
    return _svg("".join(body), WIDTH, height, f"Attention values of block {found.block}")


def rollout_maps(maps: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Maps side by side, in shades of one colour, each scaled to its own largest value."""
    size, gap = 200.0, 20.0
    body = []
    height = size
    for index, (label, rows) in enumerate(maps.items()):
        top = max((v for row in rows for v in row), default=1.0) or 1.0
        cell = size / max(len(rows[0]), 1)
        height = cell * len(rows)
        left = index * (size + gap)
        body.append(_text(left + size / 2, 12, label))
        body.extend(
            f'<rect x="{left + c * cell:.2f}" y="{18 + r * cell:.2f}" width="{cell + 0.05:.2f}"'
            f' height="{cell + 0.05:.2f}" fill="hsl({260 - 215 * v / top:.0f} 75%'
            f' {12 + 50 * v / top:.0f}%)"/>'
            for r, row in enumerate(rows)
            for c, v in enumerate(row)
        )
    return _svg("".join(body), len(maps) * (size + gap) - gap, height + 20, "Attention rollout")


LINE_COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#c98a00", "#8a5bd6", "#17a2b8", "#8a8a8a")


def line_chart(
    lines: Mapping[str, Mapping[int, float]], across: str, up: str, unit: str = ""
) -> str:
    """One line per name over whole numbers, with a legend on the right."""
    height, right = 280, 150
    inner, tall = WIDTH - LEFT - right, height - TOP - 40
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
        body.append(_line(LEFT, y, WIDTH - right, y, ' stroke-opacity=".25"'))
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
            f'<rect x="{WIDTH - right + 12}" y="{y - 8}" width="12" height="8" fill="{color}"/>'
        )
        body.append(
            _text(WIDTH - right + 30, y, name if len(name) < 20 else f"{name[:18]}…", "start")
        )
    return _svg("".join(body), WIDTH, height, f"{up} over {across}")
