"""Attention values of one block, with the levels of 4-bit uniform and log2 codes.

python benchmarks/figures/softmax_levels.py --model VIT.onnx --calib DIR --output PNG
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from subject import batches, load, options, table

from ptq_onnx.analysis.attention_results import BlockAttention
from ptq_onnx.analysis.attention_values import LOG2, UNIFORM, attention_values, levels
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.report.plots import STYLE, save_png


def main() -> None:
    """Print what each code does to the maps of each block; draw one block where asked for."""
    parser = options(__doc__)
    parser.add_argument("--block", type=int, default=-1, help="block to draw (the last)")
    args = parser.parse_args()
    subject = load(args)
    p = subject.prepared
    simulator = Simulator(p.model, None, threads=subject.threads)
    named = [(subject.names[:2], b) for b in batches(subject.apart[:4])]
    found = attention_values(p.model, p.blocks, simulator, simulator, named)
    if found is None:
        raise SystemExit("The model has no attention.")
    rows = [
        [b.block, f"{c.code} {c.bits}", f"{c.snr_db:.1f}", f"{c.rank:.3f}",
         "…".join(f"{s:.2f}" for s in c.row_sum), f"{100 * c.zero:.1f}"]
        for b in found.blocks for c in b.codes
    ]  # fmt: skip
    table(("block", "code", "dB", "rank correlation", "row sums", "zeros %"), rows)
    if args.output:
        draw(found.blocks[args.block], Path(args.output))


def draw(block: BlockAttention, path: Path) -> None:
    """Two histograms on a log axis, each with the levels of one code."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 2.8), layout="constrained")
        FigureCanvasAgg(figure)
        edges = np.linspace(block.lowest, 0, len(block.counts) + 1)
        for column, (code, color) in enumerate(((UNIFORM, "#d9403a"), (LOG2, "#2a9134"))):
            axes = figure.add_subplot(1, 2, column + 1)
            axes.stairs(
                100 * np.array(block.counts) / sum(block.counts), edges, fill=True, color="#5b8bc9"
            )
            for level in levels(code, 4):
                if level > 0:
                    axes.axvline(np.log2(level), color=color, linewidth=0.9)
            axes.set_title(f"4-bit {code.name} levels, block {block.block}", fontsize=9)
            ticks = list(range(block.lowest, 1, 4))
            axes.set_xticks(ticks, [f"$2^{{{t}}}$" for t in ticks])
            axes.set_xlabel("attention weight, 0 to 1 (logarithmic axis)", fontsize=8)
            axes.set_ylabel("share of values, %", fontsize=8)
            axes.tick_params(labelsize=8)
        save_png(figure, path, 110)


if __name__ == "__main__":
    main()
