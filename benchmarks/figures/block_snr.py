"""SNR at the output of every block, for several quantizers side by side.

python benchmarks/figures/block_snr.py --model VIT.onnx --calib DIR --output PNG

As the report measures it: each quantizer at 8/8/8 with its own calibration and, where it has one,
its equalisation, simulated on images held out.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from subject import options, table

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.report.plots import STYLE, save_png

STYLES = {
    "vanilla": ("#d9403a", "o"), "channelwise": ("#b57700", "s"), "fqvit": ("#9467bd", "D"),
    "deploy": ("#2f7fd6", "^"),
}  # fmt: skip


def main() -> None:
    """Print a row per block; draw where asked for."""
    args = options(__doc__).parse_args()
    lines: dict[str, dict[int, float]] = {}
    for name in STYLES:
        config = QuantizeConfig(
            quantizer=name, images=args.images, analysis_images=args.apart, threads=args.threads,
            preprocess=args.preprocess, pictures=False,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            found = quantize(args.model, config=config, calib=args.calib,
                             output=Path(folder) / "out")  # fmt: skip
        assert found.analysis is not None
        lines[name] = {b.block: b.snr_db for b in found.analysis.graphwise.blocks}
    rows = [[b, *(f"{line[b]:.1f}" for line in lines.values())] for b in lines["vanilla"]]
    table(("block", *(f"{name}, dB" for name in lines)), rows)
    if args.output:
        draw(lines, Path(args.output))


def draw(lines: dict[str, dict[int, float]], path: Path) -> None:
    """A line per quantizer, named at its end."""
    with mpl.rc_context({**STYLE, "font.size": 11}):
        figure = Figure(figsize=(8.4, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for name, line in lines.items():
            color, marker = STYLES[name]
            bold = name == "deploy"
            axes.plot(list(line), list(line.values()), color=color, marker=marker,
                      linewidth=3 if bold else 1.6)  # fmt: skip
            axes.annotate(
                name, (max(line), line[max(line)]), xytext=(8, 0), textcoords="offset points",
                va="center", color=color, fontweight="bold",
            )  # fmt: skip
        axes.axhline(0, linewidth=0.8, linestyle=":")
        axes.set_xlabel("block (number)")
        axes.set_ylabel("SNR of the block's output, dB\n(higher is better)")
        axes.set_xticks(list(lines["vanilla"]))
        axes.margins(x=0.03)
        axes.grid(True, axis="y", alpha=0.25)
        save_png(figure, path, 120)


if __name__ == "__main__":
    main()
