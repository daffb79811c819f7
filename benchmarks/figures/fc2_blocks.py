"""Noise to signal of fc2 over the blocks: one scale, against one per channel for fc2.

    python benchmarks/figures/fc2_blocks.py --model VIT.onnx --calib DIR --output fc2.png

Nothing but fc2 is quantized, in all blocks: its input, weight and output. The class token and
the patches apart.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from subject import batches, load, options, table

from ptq_onnx.analysis.graphwise import graphwise
from ptq_onnx.report.plots import STYLE, save_png

STYLES = {"one scale": ("#d9403a", "o"), "one per channel": ("#3a7fc4", "s")}


def main() -> None:
    """Print the table; draw it where asked for."""
    parser = options(__doc__)
    parser.add_argument("--method", default="minmax", help="calibration (minmax)")
    args = parser.parse_args()
    subject = load(args)
    p = subject.prepared
    others = tuple(
        sorted({s.role.removesuffix(".weight") for s in p.sites.values()} - {"fc2", "gelu"})
    )
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for label, channels in (("one scale", ()), ("one per channel", ("fc2",))):
        quantizer = subject.quantizer(
            quantizer="vanilla", method=args.method, keep_float=others, per_channel=channels
        )
        found = graphwise(
            p.model, quantizer, p.blocks, batches(subject.apart), held_apart=True, sites=p.sites,
            threads=subject.threads,
        )  # fmt: skip
        for op in found.ops:
            if op.role == "fc2" and op.block is not None:
                for part, value in (("class token", op.class_db), ("patches", op.patch_db)):
                    if value is not None:
                        lines.setdefault((label, part), {})[op.block] = 10 ** (-value / 10)
    blocks = sorted(next(iter(lines.values())))
    rows = [[b, *(f"{line[b]:.2e}" for line in lines.values())] for b in blocks]
    table(("block", *(f"{label}, {part}" for label, part in lines)), rows)
    if args.output:
        draw(lines, Path(args.output))


def draw(lines: dict[tuple[str, str], dict[int, float]], path: Path) -> None:
    """One line per granularity; the class token solid, patches dashed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for (label, part), line in lines.items():
            color, marker = STYLES[label]
            axes.plot(
                list(line), list(line.values()), color=color, marker=marker,
                linestyle="-" if part == "class token" else "--", label=f"{label}, {part}",
            )  # fmt: skip
        axes.set_yscale("log")
        axes.set_xticks(sorted(next(iter(lines.values()))))
        axes.set_xlabel("block (number)")
        axes.set_ylabel("fc2: noise to signal, ratio (lower is better)")
        axes.grid(True, axis="y", alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
        save_png(figure, path, 110)


if __name__ == "__main__":
    main()
