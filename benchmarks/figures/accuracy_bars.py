"""Top-1 and SQNR of 8-bit files that several tools make of two models, side by side.

python benchmarks/figures/accuracy_bars.py --output img/accuracy.png

Each tool with its best documented settings for transformers: W8A8, static, 128 calibration
images; measured in ONNX Runtime 1.31 on the same 800 ImageNet validation images, which no
calibration saw. One standard error of top-1 is 1.4 points. modelopt places its Q/DQ for TensorRT,
residual adds too. Ours: ``ptq-onnx quantize MODEL --calib CALIB``, version 5a99f3d.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from subject import table

from ptq_onnx.report.plots import GREY, STYLE, save_png

OURS, OTHERS = "#2f7fd6", "#8d949c"


@dataclass(frozen=True)
class Tool:
    """Top-1 in % and SQNR of the logits in dB, of ViT-Ti and of DeiT-Ti; None: not measured."""

    name: str
    vit: tuple[float, float]
    deit: tuple[float, float] | None
    ours: bool = False


FLOAT = (82.12, 80.88)
PRODUCTS = (
    Tool("ptq_onnx deploy", (82.12, 24.5), (80.62, 21.9), ours=True),
    Tool("nncf 3.4", (81.50, 19.2), (80.62, 13.9)),
    Tool("onnxruntime 1.31, inputs only", (82.00, 9.9), (81.25, 17.1)),
    Tool("onnxruntime 1.31, default", (75.75, 5.6), (80.25, 14.8)),
    Tool("quark 0.13", (74.75, 5.9), (80.50, 17.5)),
    Tool("onnx-neural-compressor 1.0", (74.62, 5.6), (80.88, 16.5)),
    Tool("modelopt 0.47", (4.00, -0.3), (78.75, 9.2)),
)
EVERYTHING = (
    Tool("ptq_onnx fqvit", (81.62, 11.7), None, ours=True),
    Tool("FQ-ViT official", (59.38, 2.4), (81.25, 13.5)),
    Tool("onnxruntime 1.31, all ops", (0.12, -3.0), (79.88, 8.9)),
)


def main() -> None:
    """Print the table; draw it where asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", help="a .png to write")
    args = parser.parse_args()
    rows = [
        [what, one.name, *(f"{v:g}" for v in (*one.vit, *(one.deit or ())))]
        for what, tools in (("products", PRODUCTS), ("everything", EVERYTHING))
        for one in tools
    ]
    table(("quantized", "tool", "ViT-Ti top-1", "dB", "DeiT-Ti top-1", "dB"), rows)
    if args.output:
        draw(Path(args.output))


def draw(path: Path) -> None:
    """Two panels of figures, for each of the models; the float model is a line."""
    with mpl.rc_context({**STYLE, "font.size": 11}):
        figure = Figure(figsize=(10.5, 5.6), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(1, 4, sharey=True, width_ratios=(1.25, 1, 1.25, 1))
        for index, model in enumerate(("ViT-Ti/16", "DeiT-Ti/16")):
            top1, noise = grid[2 * index], grid[2 * index + 1]
            _bars(top1, index, 0, f"{model}: top-1, %", (0, 112))
            top1.axvline(FLOAT[index], color=GREY, linestyle="--", linewidth=1)
            top1.annotate(f"float {FLOAT[index]:.1f}", (FLOAT[index], 1.005), ha="center",
                          xycoords=("data", "axes fraction"), va="bottom", fontsize=9)  # fmt: skip
            _bars(noise, index, 1, "SQNR of the logits, dB", (-4, 31))
        names = [one.name for one in (*PRODUCTS, *EVERYTHING)]
        grid[0].set_yticks(places(), names)
        grid[0].invert_yaxis()
        for label, one in zip(grid[0].get_yticklabels(), (*PRODUCTS, *EVERYTHING), strict=True):
            label.set_fontweight("bold" if one.ours else "normal")
        for place, text in ((-0.75, "only products quantized"), (len(PRODUCTS), "every op")):
            grid[0].text(-0.03, place, text, transform=grid[0].get_yaxis_transform(),
                         ha="right", va="center", style="italic")  # fmt: skip
        figure.suptitle("8-bit files of several tools, higher is better", fontsize=13)
        save_png(figure, path, 110)


def places() -> list[float]:
    """Where the bars are: a gap between the two groups."""
    return [i + (i >= len(PRODUCTS)) for i in range(len(PRODUCTS) + len(EVERYTHING))]


def _bars(axes: Axes, model: int, figure: int, title: str, limits: tuple[float, float]) -> None:
    for place, one in zip(places(), (*PRODUCTS, *EVERYTHING), strict=True):
        found = (one.vit, one.deit)[model]
        if found is None:
            axes.text(max(limits[0], 0), place, " not measured", va="center", fontsize=9)
            continue
        value = found[figure]
        axes.barh(place, value, color=OURS if one.ours else OTHERS, height=0.72)
        beside = max(value, FLOAT[model] * (figure == 0 and value > 50), 0)
        axes.text(beside, place, f" {value:.1f}", va="center", fontsize=10,
                  fontweight="bold" if one.ours else "normal")  # fmt: skip
    axes.set_xlim(*limits)
    axes.set_xlabel(title, fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


if __name__ == "__main__":
    main()
