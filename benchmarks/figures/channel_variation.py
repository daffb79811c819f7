"""Smallest and largest value of every channel of what the LayerNorms read, block by block.

python benchmarks/figures/channel_variation.py --model VIT.onnx --calib DIR --output PNG
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from subject import batches, load, options, table

from ptq_onnx.analysis.variation import variation
from ptq_onnx.analysis.variation_results import ChannelRanges
from ptq_onnx.report.plots import GREY, STYLE, save_png

SHOWN = 4
RED = "#d9403a"
LINES = {name: {"color": GREY} for name in ("boxprops", "whiskerprops", "capprops")}


def main() -> None:
    """Print the quartiles; draw where asked for."""
    args = options(__doc__).parse_args()
    subject = load(args)
    p = subject.prepared
    found = variation(
        p.model, p.blocks, p.sites, {}, batches(subject.apart), threads=subject.threads
    )
    rows = [
        [n.reader, *(f"{v:.3g}" for v in n.box), f"{n.box[4] / max(n.box[2], 1e-30):.1f}"]
        for n in found.norm_inputs
    ]
    table(("read by", "least", "1st quartile", "median", "3rd", "largest", "largest/median"), rows)
    if args.output:
        draw(found.norm_inputs, Path(args.output))


def draw(norms: tuple[ChannelRanges, ...], path: Path) -> None:
    """The channels of a few norms, spread over the depth, and boxes of all."""
    with mpl.rc_context(STYLE):
        chosen = [norms[i] for i in np.linspace(0, len(norms) - 1, SHOWN).round().astype(int)]
        figure = Figure(figsize=(8.4, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(2, SHOWN)
        for column, one in enumerate(chosen):
            axes = figure.add_subplot(grid[0, column])
            place = np.arange(len(one.low))
            axes.fill_between(place, one.low, one.high, color="#3b6fb6", step="mid", linewidth=0)
            axes.set_title(one.reader, fontsize=9)
            axes.set_xlabel("channel (number)", fontsize=8)
            if column == 0:
                axes.set_ylabel("value (no unit)", fontsize=8)
            axes.tick_params(labelsize=7)
        axes = figure.add_subplot(grid[1, :])
        boxes = [
            {
                "whislo": n.box[0],
                "q1": n.box[1],
                "med": n.box[2],
                "q3": n.box[3],
                "whishi": n.box[4],
            }
            for n in norms
        ]
        axes.bxp(boxes, showfliers=False, medianprops={"color": RED}, **LINES)
        axes.set_yscale("log")
        axes.set_xticks(range(1, len(norms) + 1))
        names = [n.reader.removeprefix("blocks.") for n in norms]
        axes.set_xticklabels(names, rotation=60, fontsize=7)
        axes.set_ylabel("largest |x| of a channel (no unit)", fontsize=8)
        axes.set_xlabel("LayerNorm that reads the tensor (block.norm)", fontsize=8)
        axes.grid(True, axis="y", alpha=0.3)
        save_png(figure, path, 110)


if __name__ == "__main__":
    main()
