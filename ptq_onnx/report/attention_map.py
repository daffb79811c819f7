"""Draws attention maps: on the picture, bare, and head by head, one column per model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from ptq_onnx.analysis.attention_results import AttentionMap
from ptq_onnx.analysis.decibels import decibels
from ptq_onnx.files.file_names import printable
from ptq_onnx.report.plots import STYLE, save_png
from ptq_onnx.report.svg import MAP_SHARE, map_limit

Array = NDArray[np.float32]
Picture = NDArray[np.uint8]

COLORS = "inferno"
LARGEST_FILE = 400_000
PANEL = 2.0
"""Width of one large panel in inches; the other sizes here are inches too."""
GAP = 0.08
MARGIN = 0.3
TEXT = 0.22
"""Height of a line of text."""
DPI = 110
HEADS_IN_A_ROW = 8
TITLES: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 9, "axes.titlepad": 3}


def overlay(picture: Picture, weights: Array) -> Picture:
    """The picture [H, W, 3] in grey with weights (any size, 0…1) upsampled bilinearly on it.

    Colour covers the picture by 35 % where the weight is 0 and by 70 % where it is 1.
    """
    height, width = picture.shape[:2]
    resized = Image.fromarray(weights.astype(np.float32)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    smooth = np.clip(np.asarray(resized), 0, 1)
    colors = mpl.colormaps[COLORS](smooth)[..., :3] * 255
    grey = picture @ np.array([0.299, 0.587, 0.114])
    cover = (0.35 + 0.35 * smooth)[..., None]
    mixed = np.rint((1 - cover) * grey[..., None] + cover * colors)
    return np.asarray(mixed, np.uint8)


def draw_attention(found: AttentionMap, path: Path, chosen: Sequence[int] = ()) -> None:
    """Write one PNG of at most 400 kB: picture, maps of all models, and their heads, all or
    those ``chosen`` that there are.

    Maps are means over heads, in one colour scale for all models, which ends at their
    percentile :data:`MAP_SHARE`; a head has a scale of its own, again one for all models. The
    file has no background and appears in one step.
    """
    maps = {k: np.nan_to_num(v.astype(np.float32)) for k, v in found.maps.items()}
    aspect = found.image.shape[0] / found.image.shape[1]
    sheet = _Sheet(found, maps, aspect, chosen)
    with mpl.rc_context({**STYLE, **TITLES}):
        save_png(sheet.draw(), path, DPI, LARGEST_FILE)


class _Sheet:
    """One figure, its panels laid out in inches from the top left corner."""

    def __init__(
        self,
        found: AttentionMap,
        maps: dict[str, Array],
        aspect: float,
        chosen: Sequence[int] = (),
    ) -> None:
        self.found, self.maps, self.aspect = found, maps, aspect
        count = max(heads.shape[0] for heads in maps.values())
        self.heads = [h for h in dict.fromkeys(chosen) if h < count] if chosen else [*range(count)]
        self.lines = -(-len(self.heads) // HEADS_IN_A_ROW)
        self.per_line = -(-len(self.heads) // max(self.lines, 1))
        self.width = 2 * MARGIN + max(1 + len(maps), 3) * (PANEL + GAP) - GAP
        columns = max(self.per_line, 6)
        self.small = (self.width - 2 * MARGIN + GAP) / columns - GAP
        self.line = TEXT + len(maps) * (self.small * aspect + GAP)
        self.top = MARGIN + 3.5 * TEXT
        self.below = self.top + PANEL * aspect + GAP
        self.start = self.below + max(PANEL * aspect, 1.2) + 2 * TEXT
        self.height = self.start + self.lines * self.line + 0.5 * MARGIN
        self.figure = Figure(figsize=(self.width, self.height))
        FigureCanvasAgg(self.figure)

    def draw(self) -> Figure:
        """The finished figure."""
        name = printable(self.found.image_name)
        name = name if len(name) <= 60 else "…" + name[-59:]
        for text, line, size in (
            (f"Attention of block {self.found.block}: {self.found.query}", 0.4, 12),
            (name, 1.5, 9),
        ):
            at = 1 - (MARGIN + line * TEXT) / self.height
            x = MARGIN / self.width
            self.figure.text(x, at, text, va="center", fontsize=size, parse_math=False)
        self.large()
        for place, head in enumerate(self.heads):
            self.head(place, head)
        return self.figure

    def panel(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes without ticks, ``left`` and ``top`` from the top left corner."""
        bottom = self.height - top - height
        axes = self.figure.add_axes(
            (
                left / self.width,
                bottom / self.height,
                width / self.width,
                height / self.height,
            )
        )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        return axes

    def large(self) -> None:
        """Two rows: picture and overlays; below, the colour bar and the bare maps."""
        means = {label: heads.mean(axis=0) for label, heads in self.maps.items()}
        norm = Normalize(0, map_limit(*means.values()))
        picture = enlarged(self.found.image)
        tall = PANEL * self.aspect
        axes = self.panel(MARGIN, self.top, PANEL, tall)
        axes.imshow(picture, aspect="auto")
        axes.set_title("picture")
        for column, (label, mean) in enumerate(means.items(), start=1):
            left = MARGIN + column * (PANEL + GAP)
            axes = self.panel(left, self.top, PANEL, tall)
            axes.imshow(overlay(picture, np.asarray(norm(mean), np.float32)), aspect="auto")
            axes.set_title(label, fontweight="bold", parse_math=False)
            axes = self.panel(left, self.below, PANEL, tall)
            axes.imshow(mean, cmap=COLORS, norm=norm, aspect="auto")
            snr = self.found.snr_db.get(label)
            axes.set_xlabel(told(snr))
        self.scale(norm)

    def scale(self, norm: Normalize) -> None:
        """The colour bar under the picture."""
        axes = self.panel(MARGIN + 0.1, self.below + 0.55, PANEL - 0.4, 0.16)
        bar = self.figure.colorbar(
            ScalarMappable(norm, COLORS), cax=axes, orientation="horizontal", extend="max"
        )
        bar.ax.locator_params(nbins=3)
        bar.set_label(f"attention weight,\nends at percentile {MAP_SHARE:g}")
        axes.set_title("mean over heads,\none scale for all models", loc="left", pad=6)

    def head(self, place: int, head: int) -> None:
        """The maps of one head, the models under each other; ``place`` counts the heads drawn."""
        present = {label: heads[head] for label, heads in self.maps.items() if head < len(heads)}
        top = map_limit(*present.values())
        left = MARGIN + place % self.per_line * (self.small + GAP)
        above = self.start + place // self.per_line * self.line + TEXT
        tall = self.small * self.aspect
        for row, (label, weights) in enumerate(present.items()):
            axes = self.panel(left, above + row * (tall + GAP), self.small, tall)
            axes.imshow(weights, cmap=COLORS, vmin=0, vmax=top, aspect="auto")
            if row == 0:
                axes.set_title(f"head {head}", fontsize=8)
            if place % self.per_line == 0:
                axes.set_ylabel(label, fontsize=8, parse_math=False)


def told(snr: float | None) -> str:
    """The SNR of a map in words."""
    if snr is None:
        return "reference"
    return "identical" if snr >= decibels(0.0) else f"SNR {snr:.1f} dB"


def enlarged(picture: Picture) -> Picture:
    """Small pictures by a whole factor, pixel for pixel, so that maps on top look smooth."""
    factor = max(1, round(PANEL * DPI / picture.shape[1]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)
