"""The figure of error over depth: one line per role, one point per block."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ptq_onnx.analysis.results import OpError, decibels
from ptq_onnx.files.held_folder import replacing

LINES: dict[str, tuple[str, str, str]] = {
    "norm1": ("#2ca02c", "-", "v"),
    "qkv": ("#1f77b4", "-", "o"),
    "q": ("#1f77b4", "--", "<"),
    "k": ("#1f77b4", ":", ">"),
    "v": ("#1f77b4", "-.", "^"),
    "softmax": ("#17a2b8", "--", "D"),
    "proj": ("#5b6fd6", "-", "s"),
    "residual1": ("#8a8a8a", "-", "P"),
    "norm2": ("#2ca02c", "--", "^"),
    "fc1": ("#c98a00", "-", "o"),
    "gelu": ("#c98a00", "--", "X"),
    "fc2": ("#d62728", "-", "o"),
    "residual2": ("#8a8a8a", "--", "p"),
}
"""Roles drawn, in the order of a block: colour by family, line style, marker."""

EMPHASISED = "fc2"
TEXT = "#010203"
"""Colour of text and axes; becomes currentColor in the SVG, so that the page decides."""


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


def snr_over_blocks(ops: Sequence[OpError], path: Path | None = None) -> str:
    """SVG of the noise-to-signal ratio (log axis, lower is better) over the blocks.

    The text has no prologue, so a page can hold it as it is, and equal ``ops`` give equal
    text. Each line is a group with the id ``snr-ROLE``. ``path``: write a PNG too.
    """
    figure = _draw(series(ops))
    if path is not None:
        save_png(figure, path, dpi=150)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "ptq_onnx", "svg.fonttype": "none"}):
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue().replace(TEXT, "currentColor")
    return text[text.index("<svg") :].rstrip()


def _draw(lines: dict[str, dict[int, float]]) -> Figure:
    with mpl.rc_context({"text.color": TEXT, "font.size": 10}):
        figure = Figure(figsize=(9.0, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_xlabel("Block", color=TEXT)
        axes.set_ylabel("Noise to signal (lower is better)", color=TEXT)
        axes.tick_params(colors=TEXT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(TEXT)
        if not lines:
            axes.set_axis_off()
            axes.text(0.5, 0.5, "No error to draw in any block", ha="center", color=TEXT)
            return figure
        for role, points in lines.items():
            color, style, marker = LINES[role]
            strong = role == EMPHASISED
            axes.plot(
                list(points),
                list(points.values()),
                color=color,
                linestyle=style,
                marker=marker,
                linewidth=3.2 if strong else 1.1,
                markersize=7 if strong else 4,
                alpha=1.0 if strong else 0.8,
                zorder=5 if strong else 3,
                label=role,
                gid=f"snr-{role}",
            )
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13, min_n_ticks=1))
        axes.grid(True, axis="y", which="major", color="#8a8a8a", alpha=0.3, linewidth=0.7)
        right = axes.twinx()
        right.set_ylim(*(decibels(limit) for limit in axes.get_ylim()))
        right.set_ylabel("dB (higher is better)", color=TEXT)
        right.tick_params(colors=TEXT, length=0)  # without the axis line ticks look like minus
        right.spines[:].set_visible(False)
        legend = figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
        legend.set_frame_on(False)
        for label in legend.get_texts():
            label.set_fontweight("bold" if label.get_text() == EMPHASISED else "normal")
    return figure


def save_png(figure: Figure, path: Path, dpi: int, limit: int | None = None) -> None:
    """Write a figure to ``path`` in one step, so that no half file is ever there.

    Above ``limit`` bytes it is drawn coarser, and at last stored with 256 colours.
    """
    data = _png(figure, dpi)
    for share in (0.85, 0.7) if limit is not None else ():
        if limit is not None and len(data) > limit:
            data = _png(figure, round(dpi * share))
    if limit is not None and len(data) > limit:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("RGB").quantize(256).save(buffer, "png", optimize=True)
        data = buffer.getvalue()
    with replacing(path) as new:
        new.write_bytes(data)


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
