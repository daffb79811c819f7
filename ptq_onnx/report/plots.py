"""The figure of error over depth: one line per role, one point per block."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ptq_onnx.analysis.decibels import decibels
from ptq_onnx.analysis.results import OpError
from ptq_onnx.files.held_folder import replacing

LINES: dict[str, tuple[str, str, str]] = {
    "norm1": ("#2a9134", "-", "v"),
    "qkv": ("#3a7fc4", "-", "o"),
    "q": ("#3a7fc4", "--", "<"),
    "k": ("#3a7fc4", ":", ">"),
    "v": ("#3a7fc4", "-.", "^"),
    "qk": ("#9467bd", "-", "d"),
    "softmax": ("#9467bd", "--", "D"),
    "av": ("#9467bd", "-.", "h"),
    "proj": ("#6f78d8", "-", "s"),
    "residual1": ("#808080", "-", "P"),
    "norm2": ("#2a9134", "--", "^"),
    "fc1": ("#b57700", "-", "o"),
    "gelu": ("#b57700", "--", "X"),
    "fc2": ("#b57700", "-.", "*"),
    "residual2": ("#808080", "--", "p"),
}
"""Roles drawn, in the order of a block: colour by family, line style, marker. Each colour has a
contrast of 3 and more against a white and a dark page."""

WORST = "#d9403a"
"""Colour of the role with the largest error, whichever it is."""
TEXT = "#010203"
"""Colour of text and axes; becomes currentColor in the SVG, so that the page decides."""
GREY = "#767b82"
"""Text of a picture without a background: as far from white as from a dark page."""
STYLE: dict[Any, Any] = {
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color",
         "ytick.color", "legend.labelcolor"), GREY),
    "axes.facecolor": "none", "figure.facecolor": "none", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
"""Of all pictures that stand by themselves, on light and on dark pages."""
TITLE = "Error of each role over the blocks"
DESCRIPTION = (
    "A line per role: noise to signal at its output, on a logarithmic axis, over the number of the"
    " block; lower is better. On the right the same in dB. "
)


def series(ops: Sequence[OpError]) -> dict[str, dict[int, float]]:
    """Noise-to-signal ratio by role and block, roles in the order of :data:`LINES`.

    Where a block has a role twice, the worse counts. A ratio of zero, or one that is not
    finite, has no place on a log axis and is left out.
    """
    found: dict[str, dict[int, float]] = {}
    for role in LINES:
        points: dict[int, float] = {}
        for op in ops:
            if op.role == role and op.block is not None and 0 < op.snr < math.inf:
                points[op.block] = max(op.snr, points.get(op.block, 0.0))
        if points:
            found[role] = dict(sorted(points.items()))
    return found


def worst_point(lines: Mapping[str, Mapping[int, float]]) -> tuple[str, int] | None:
    """Role and block of the largest ratio drawn; None where nothing is."""
    found = [(snr, role, block) for role, line in lines.items() for block, snr in line.items()]
    return max(found, key=lambda one: one[0])[1:] if found else None


def snr_over_blocks(ops: Sequence[OpError], path: Path | None = None, narrow: bool = False) -> str:
    """SVG of the noise-to-signal ratio (log axis, lower is better) over the blocks.

    The role with the largest ratio is thick, red, and named at its line. The text has no
    prologue, so a page can hold it as it is, and equal ``ops`` give equal text. Each line is a
    group with the id ``snr-ROLE``; ``narrow``, for a phone's width, ``narrow-ROLE``. ``path``:
    write a PNG too, without a background.
    """
    lines = series(ops)
    if path is not None:
        save_png(_draw(lines, GREY, narrow), path, dpi=150)
    buffer = io.StringIO()
    salt = "narrow" if narrow else "ptq_onnx"
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure = _draw(lines, TEXT, narrow)
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue().replace(TEXT, "currentColor")
    text = text[text.index("<svg") :].rstrip()
    if narrow:  # beside the wide one on one page
        text = re.sub(r'\bid="([\w.]+_\d+)"', r'id="narrow-\1"', text)
    told = "".join(f"<{tag}>{escape(said)}</{tag}>" for tag, said in
                   (("title", TITLE), ("desc", DESCRIPTION + _worst_told(lines))))  # fmt: skip
    return re.sub(r"^<svg([^>]*)>", lambda head: f'<svg{head[1]} role="img">{told}', text, count=1)


def _worst_told(lines: Mapping[str, Mapping[int, float]]) -> str:
    worst = worst_point(lines)
    if worst is None:
        return "There is no error to draw."
    role, block = worst
    return f"The largest is {role} of block {block}, {decibels(lines[role][block]):.1f} dB."


def _draw(lines: dict[str, dict[int, float]], text: str, narrow: bool = False) -> Figure:
    with mpl.rc_context({"text.color": text, "font.size": 10}):
        figure = Figure(figsize=(4.4, 5.0) if narrow else (9.0, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_xlabel("Block", color=text)
        axes.set_ylabel("Noise to signal, ratio (lower is better)", color=text)
        axes.tick_params(colors=text)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(text)
        worst = worst_point(lines)
        if worst is None:
            axes.set_axis_off()
            axes.text(0.5, 0.5, "No error to draw in any block", ha="center", color=text)
            return figure
        for role, points in lines.items():
            color, style, marker = LINES[role]
            strong = role == worst[0]
            axes.plot(
                list(points),
                list(points.values()),
                color=WORST if strong else color,
                linestyle="-" if strong else style,
                marker=marker,
                linewidth=3.2 if strong else 1.1,
                markersize=7 if strong else 4,
                alpha=1.0 if strong else 0.8,
                zorder=5 if strong else 3,
                label=role,
                gid=f"{'narrow' if narrow else 'snr'}-{role}",
            )
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(
            MaxNLocator(integer=True, nbins=7 if narrow else 13, min_n_ticks=1)
        )
        axes.grid(True, axis="y", which="major", color="#8a8a8a", alpha=0.3, linewidth=0.7)
        _name(axes, lines, worst, text)
        right = axes.twinx()
        right.set_ylim(*(decibels(limit) for limit in axes.get_ylim()))
        right.set_ylabel("SNR, dB (higher is better)", color=text, labelpad=8)
        right.tick_params(colors=text, length=0)  # without the axis line ticks look like minus
        right.spines[:].set_visible(False)
        legend = figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside lower center" if narrow else "outside right upper",
            ncols=4 if narrow else 1,
            fontsize=9 if narrow else 10,
        )
        legend.set_frame_on(False)
        for label in legend.get_texts():
            label.set_fontweight("bold" if label.get_text() == worst[0] else "normal")
    return figure


def _name(
    axes: Axes, lines: Mapping[str, Mapping[int, float]], worst: tuple[str, int], text: str
) -> None:
    """Name the worst role above its highest point."""
    role, block = worst
    blocks = [b for line in lines.values() for b in line]
    share = (block - min(blocks)) / max(max(blocks) - min(blocks), 1)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.08)
    axes.annotate(
        f"{role}, block {block}: {decibels(lines[role][block]):.1f} dB",
        (block, lines[role][block]),
        xytext=(0, 9),
        textcoords="offset points",
        ha="left" if share < 0.25 else "right" if share > 0.75 else "center",
        color=text,
        fontweight="bold",
    )


def save_png(figure: Figure, path: Path, dpi: int, limit: int | None = None) -> None:
    """Write a figure without a background to ``path`` in one step, so that no half file is there.

    Above ``limit`` bytes it is drawn coarser, and at last stored with 256 colours.
    """
    data = _png(figure, dpi)
    for share in (0.85, 0.7) if limit is not None else ():
        if limit is not None and len(data) > limit:
            data = _png(figure, round(dpi * share))
    if limit is not None and len(data) > limit:
        buffer = io.BytesIO()
        picture = Image.open(io.BytesIO(data)).convert("RGBA")
        few = picture.quantize(256, Image.Quantize.FASTOCTREE)  # the one that keeps transparency
        few.save(buffer, "png", optimize=True)
        data = buffer.getvalue()
    with replacing(path) as new:
        new.write_bytes(data)


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None}, transparent=True)
    return buffer.getvalue()
