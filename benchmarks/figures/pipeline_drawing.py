"""What a run does, step by step, with the counts of one: load, fuse, …, export.

python benchmarks/figures/pipeline_drawing.py --output img/pipeline.png

Each step is run, on the embedded model unless ``--model`` names another, and its box says what
came of it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
from boxes import arrow, box
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from subject import options, table

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.report.plots import STYLE, save_png

WIDE, TALL, GAP = 2.05, 1.5, 0.5


def main() -> None:
    """Print what each step does; draw it where asked for."""
    args = options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = QuantizeConfig(
            images=args.images, analysis_images=args.apart, threads=args.threads,
            preprocess=args.preprocess, pictures=False,
        )  # fmt: skip
        report = quantize(
            args.model, config=config, calib=args.calib, output=Path(folder) / "out"
        ).report
    steps = told(report)
    table(("step", "what it does", "in this run"), steps)
    if args.output:
        draw(steps, Path(args.output))


def told(report: dict) -> list[tuple[str, str, str]]:  # type: ignore[type-arg]
    """Step, what it does, and what came of it."""
    cleaned, analysis = report["cleaned"], report["analysis"]
    fused = sum(report["fusions"].values())
    roles = len({r["role"] for r in report["roles"].values()})
    codes = Counter(t["granularity"] for t in report["tensors"])
    first, *others = [f"{count} per {name}" for name, count in codes.most_common()]
    by = f"{first}\n{', '.join(others)}"
    sizes = report["sizes"]
    moves = len(report["equalization"]["moves"])
    return [
        ("load", "any exporter's ONNX, cleaned",
         f"{cleaned['nodes_before']} → {cleaned['nodes_after']} nodes"),
        ("fuse", "LayerNorm, GELU, linears …", f"{fused} fused, {report['blocks']} blocks"),
        ("dispatch", "a number format per tensor, by role", f"{roles} roles: {by}"),
        ("calibrate", "ranges on images, then equalise",
         f"{report['calibration']['images']} images, {moves} moves"),
        ("analyse", "the error of every op, simulated", f"{len(analysis['ops'])} ops on\n"
         f"{analysis['images']} images held out"),
        ("export", "standard ONNX for the runtime",
         f"{sizes['float'] / 1e6:.2f} → {sizes['quantized'] / 1e6:.2f} MB\n"
         f"{report['coverage']['percent']:.0f} % of MACs in integers"),
    ]  # fmt: skip


def draw(steps: list[tuple[str, str, str]], path: Path) -> None:
    """Two rows of boxes, what goes in on the left and what comes out on the right."""
    columns = 3
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.6))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, 9.6)
        axes.set_ylim(0, 4.6)
        at = [
            (1.75 + (i % columns) * (WIDE + GAP + 0.5), 3.45 - (i // columns) * 2.2)
            for i in range(len(steps))
        ]
        for (x, y), (name, does, found) in zip(at, steps, strict=True):
            box(axes, x, y, WIDE + 0.45, TALL, name, f"{does}\n\n{found}", size=12)
        half = (WIDE + 0.45) / 2
        for index, ((x, y), (u, v)) in enumerate(pairwise(at)):
            if index % columns < columns - 1:
                arrow(axes, (x + half, y), (u - half, v))
            else:
                axes.plot([x, x, u, u], [y - TALL / 2, 2.35, 2.35, v + TALL / 2 + 0.18],
                          color=mpl.rcParams["text.color"], linewidth=1.3)  # fmt: skip
                arrow(axes, (u, v + TALL / 2 + 0.2), (u, v + TALL / 2))
        axes.text(at[0][0], 4.35, "model.onnx + a folder of images", ha="center", fontsize=10)
        axes.text(at[-1][0], 0.25, "quantized.onnx, report.html, report.json", ha="center",
                  fontsize=10)  # fmt: skip
        save_png(figure, path, 120)


if __name__ == "__main__":
    main()
