"""Boxes and arrows, for drawings that stand on light and on dark pages."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ptq_onnx.report.plots import GREY

FILL, DARK = "#dbe7f6", "#15202e"
"""A box brings its own ground: dark text on it has a contrast of 13 on any page."""


def box(
    axes: Axes, x: float, y: float, wide: float, tall: float, title: str, small: str = "",
    fill: str = FILL, size: float = 11,
) -> None:  # fmt: skip
    """A box around (x, y) with a title, and lines of small print below it."""
    axes.add_patch(
        FancyBboxPatch(
            (x - wide / 2, y - tall / 2), wide, tall,
            boxstyle="round,pad=0,rounding_size=0.08", facecolor=fill, edgecolor=GREY, linewidth=1,
        )
    )  # fmt: skip
    lift = tall * 0.3 if small else 0
    axes.text(x, y + lift, title, ha="center", va="center", color=DARK, fontsize=size,
              fontweight="bold")  # fmt: skip
    if small:
        axes.text(x, y - tall * 0.13, small, ha="center", va="center", color=DARK,
                  fontsize=size - 2.5, linespacing=1.25)  # fmt: skip


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0
) -> None:
    """From one point to another."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color=GREY, linewidth=1.3,
            connectionstyle=f"arc3,rad={bend}", shrinkA=1, shrinkB=1,
        )
    )  # fmt: skip
