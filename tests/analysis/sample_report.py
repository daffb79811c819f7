"""A report of a ViT with 12 blocks, made up but of real sizes, for the tests of the drawings."""

from dataclasses import asdict
from typing import Any

import numpy as np

from ptq_onnx.analysis.attention_results import AttentionMap
from ptq_onnx.analysis.decibels import decibels, plain
from ptq_onnx.analysis.results import BlockError, OpError
from ptq_onnx.config.quantize_config import QuantizeConfig

BASE = {
    "norm1": 2e-4, "qkv": 8e-4, "qk": 1e-3, "qk_scale": 1e-3, "softmax": 6e-3, "av": 3e-3,
    "proj": 5e-3, "residual1": 1e-3, "norm2": 9e-4, "fc1": 2e-3, "gelu": 4e-3, "fc2": 1.2e-2,
    "residual2": 1.5e-3,
}  # fmt: skip
OP_TYPES = {
    "qk": "MatMul", "av": "MatMul", "qk_scale": "Mul", "softmax": "Softmax", "gelu": "Gelu",
    "norm1": "LayerNormalization", "norm2": "LayerNormalization", "residual1": "Add",
    "residual2": "Add",
}  # fmt: skip
WIDTHS = {"fc1": 768, "gelu": 768, "qkv": 576}


def make_ops(blocks: int = 12, seed: int = 0) -> list[OpError]:
    """Ops of all blocks in graph order; fc2 of blocks 5 and 6 stands out."""
    rng = np.random.default_rng(seed)
    ops = [_op("/patch_embed/proj", "Conv", "patch_embed", None, 3e-4)]
    for block in range(blocks):
        for role, base in BASE.items():
            wide = 6 if role == "fc2" and block in (5, 6) else 1
            snr = base * wide * (1 + block / 3) * float(np.exp(0.3 * rng.normal()))
            kind = OP_TYPES.get(role, "Linear")
            ops.append(_op(f"/blocks.{block}/{role}", kind, role, block, snr))
    ops.append(_op("/norm", "LayerNormalization", "norm", None, 9e-4))
    ops.append(_op("/head", "Linear", "head", None, 0.0))
    return ops


def _op(node: str, kind: str, role: str, block: int | None, snr: float) -> OpError:
    return OpError(
        node, kind, role, block, snr, decibels(snr), 2 * snr, 1 - snr / 2, 30 * snr,
        role not in ("qk", "head"),
    )  # fmt: skip


def make_attention(
    heads: int = 4,
    grid: tuple[int, int] = (14, 14),
    size: tuple[int, int] = (224, 224),
    labels: tuple[str, ...] = ("float", "vanilla", "fqvit"),
) -> AttentionMap:
    """A smooth picture and one bump of attention per head, noisier for the later labels."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[: grid[0], : grid[1]]
    bumps = [
        np.exp(-((y - rng.uniform(0, grid[0])) ** 2 + (x - rng.uniform(0, grid[1])) ** 2) / 18)
        for _ in range(heads)
    ]
    maps = np.stack(bumps) / np.sum(bumps, axis=(1, 2), keepdims=True)
    rows, columns = np.mgrid[: size[0], : size[1]]
    image = np.stack([rows % 256, columns % 256, (rows * columns) // 200 % 256], axis=-1)
    return AttentionMap(
        block=11,
        image=image.astype(np.uint8),
        image_name="cat.jpg",
        query="class token",
        maps={
            label: (maps * np.exp(0.3 * i * rng.normal(size=maps.shape))).astype(np.float32)
            for i, label in enumerate(labels)
        },
        snr_db={label: 12.34 * i if i else None for i, label in enumerate(labels)},
    )


def make_report(blocks: int = 12) -> dict[str, Any]:
    """What the pipeline writes to report.json, everything measured."""
    ops = make_ops(blocks)
    config = QuantizeConfig(per_channel=("fc2@5,6",))
    ends = [
        asdict(BlockError(op.block, op.snr, op.snr_db))
        for op in ops
        if op.role == "residual2" and op.block is not None
    ]
    return {
        "ptq_onnx": "0.1.0",
        "model": {
            "path": "vit_tiny.onnx", "bytes": 22_900_000, "opset": 14, "producer": "pytorch",
            "inputs": [{"name": "image", "shape": ["batch", 3, 224, 224]}],
            "outputs": [{"name": "logits", "shape": ["batch", 1000]}],
        },
        "config": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()},
        "preprocess": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "size": [224, 224],
                       "crop_pct": 0.9, "interpolation": "bicubic", "channels": 3},
        "cleaned": {"nodes_before": 1111, "nodes_after": 584, "opset_before": 14, "opset": 21,
                    "notes": []},
        "fusions": {"LayerNormalization": 25, "Gelu": 12, "Linear": 49},
        "blocks": blocks,
        "roles": {op.node: {"role": op.role, "block": op.block} for op in ops},
        "calibration": {"source": "calib", "images": 128, "skipped": ["broken.jpg"],
                        "method": "robust"},
        "arithmetic": "float",
        "tensors": _tensors(blocks),
        "floats": [
            {"tensor": f"blocks.{b}.{r}.bias", "role": r, "block": b,
             "reason": "bias: float here, int32 on integer hardware"}
            for b in range(blocks) for r in ("qkv", "proj", "fc1", "fc2")
        ],
        "analysis": plain({"images": 32, "held_apart": True, "ops": [asdict(op) for op in ops],
                           "blocks": ends}),
        "accuracy": {
            "count": 500, "float": {"top1": 75.4, "top5": 92.8},
            "quantized": {"top1": 74.2, "top5": 92.4, "sqnr_db": 21.37, "agreement": 93.6},
        },
        "fidelity": {"images": 500, "sqnr_db": 21.37, "agreement": 93.6},
        "sizes": {"float": 22_900_000, "quantized": 5_900_000},
        "notes": ["1 calibration image could not be read and was skipped."],
    }  # fmt: skip


def _tensors(blocks: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(2)
    out = []
    for block in range(blocks):
        for role in BASE:
            common = {
                "block": block, "bits": 8, "signed": False, "symmetric": False,
                "granularity": "tensor", "code": "uniform", "method": "robust",
                "renormalize": False, "scale": float(rng.uniform(1e-3, 0.1)), "zero_point": 128,
                "axis": None, "clip": [-3.25, 4.5], "parameter": False,
            }  # fmt: skip
            entry = {"tensor": f"/blocks.{block}/{role}_output_0", "role": role, **common}
            if role == "softmax":
                entry |= {"code": "log2", "scale": 1.0, "zero_point": 0}
            if role in ("norm1", "residual1", "residual2"):
                values = rng.integers(0, 4, 192).tolist()
                entry |= {"granularity": "ptf", "alpha": {"shape": [192], "values": values}}
            out.append(entry)
            if OP_TYPES.get(role) is None:
                scales = rng.uniform(1e-4, 1e-2, WIDTHS.get(role, 192)).tolist()
                out.append(
                    {**common, "tensor": f"blocks.{block}.{role}.weight", "role": f"{role}.weight",
                     "signed": True, "symmetric": True, "granularity": "channel",
                     "scale": scales, "zero_point": [0] * len(scales), "axis": 1,
                     "clip": [-0.8, 0.8], "parameter": True}
                )  # fmt: skip
    return out
