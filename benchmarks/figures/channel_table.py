"""Per-channel scales on FC1, FC2, QKV, Proj and LN, alone and together: eight rows.

    python benchmarks/figures/channel_table.py --model VIT.onnx --calib DIR --preprocess inception

The base is ``vanilla``, everything quantized per tensor. Each row gives activations and weights
of the named ops a scale per channel; LN means inputs and outputs of the LayerNorms. SNR of
logits and of the last norm's output (all tokens), and the share of equal top classes, on images
held out from calibration.
"""

from __future__ import annotations

from typing import Any

from subject import load, options, table

from ptq_onnx.analysis.sensitivity import errors_of
from ptq_onnx.analysis.variants import Images

LINEARS = ("fc1", "fc2", "qkv", "proj")
NORMS = ("embed", "pre_norm", "norm1", "norm2", "norm", "residual1", "residual2")
ROWS: dict[str, tuple[str, ...]] = {
    "none (vanilla)": (),
    "FC1": ("fc1",),
    "FC2": ("fc2",),
    "QKV": ("qkv",),
    "Proj": ("proj",),
    "LN": NORMS,
    "FC1 + FC2 + QKV + Proj": LINEARS,
    "all five": (*LINEARS, *NORMS),
}


def main() -> None:
    """Print the table."""
    args = options(__doc__)
    args.add_argument("--method", default="minmax", help="calibration (minmax)")
    found = args.parse_args()
    subject = load(found)
    p = subject.prepared
    known = {r.name for r in p.blocks.roles.values()}
    rows: list[list[Any]] = []
    for name, roles in ROWS.items():
        chosen = tuple(r for r in roles if r in known)
        quantizer = subject.quantizer(quantizer="vanilla", method=found.method, per_channel=chosen)
        logits, features = errors_of(
            p.model, quantizer.specs, p.blocks, Images(subject.apart), threads=subject.threads
        )
        wide = sum(s.rule.granularity == "channel" for s in quantizer.specs.values())
        rows.append(
            [name, wide, f"{logits.snr_db:.1f}", f"{features:.1f}", f"{logits.agreement:.1f}"]
        )
    table(("per channel", "tensors", "logits dB", "features dB", "same class %"), rows)


if __name__ == "__main__":
    main()
