"""Attention of one block on an image: float, and held in 8 and 4 bits, uniform and LIS.

python benchmarks/figures/attention_triptych.py --output PNG
"""

from __future__ import annotations

from pathlib import Path

from subject import load, options, table

from ptq_onnx.analysis.attention import attention_maps, code_runs
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.report.attention_map import draw_attention


def main() -> None:
    """Print the SNR of the maps; draw where asked for."""
    parser = options(__doc__)
    parser.add_argument("--block", type=int, help="block (the last)")
    args = parser.parse_args()
    subject = load(args)
    p = subject.prepared
    runs = code_runs(Simulator(p.model, None, threads=subject.threads))
    chosen = None if args.block is None else [args.block]
    (found,) = attention_maps(
        p.model, p.blocks, runs, subject.apart[:1], subject.names[0], subject.preprocess, chosen
    )
    rows = [[k, "reference" if v is None else f"{v:.1f}"] for k, v in found.snr_db.items()]
    table(("maps", "dB"), rows)
    if args.output:
        draw_attention(found, Path(args.output))


if __name__ == "__main__":
    main()
