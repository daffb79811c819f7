"""Top-1, SQNR and agreement of every quantizer on the sample models: one table.

    python benchmarks/accuracy.py --data ../shared [--models vit,deit] [--rows fqvit,…]

Each row quantizes the model with 128 calibration images and runs the exported file in ONNX
Runtime, optimizations on, on all validation images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.evaluation.evaluate import evaluate
from ptq_onnx.images.labels import labels_for
from ptq_onnx.images.opening import open_images
from ptq_onnx.pipeline.preprocessing import resolve_preprocess
from ptq_onnx.pipeline.quantize import quantize

MODELS = {
    "vit": ("vit_tiny_patch16_224.opset14.onnx", "inception"),
    "vit-dynamo": ("vit_tiny_patch16_224.dynamo.onnx", "inception"),
    "deit": ("deit_tiny_patch16_224.opset17.onnx", "imagenet"),
}
ROWS: dict[str, dict[str, Any]] = {
    "vanilla 8/8/8": {"quantizer": "vanilla"},
    "channelwise 8/8/8": {"quantizer": "channelwise"},
    "channelwise 8/8/8, all roles": {"quantizer": "channelwise", "per_channel": ("all",)},
    "deploy 8/8/8": {"quantizer": "deploy"},
    "deploy 8/8/8, gptq": {"quantizer": "deploy", "rounding": "gptq"},
    "deploy 8/8/8, adaround": {"quantizer": "deploy", "rounding": "adaround"},
    "deploy 8/8/8, tensorrt": {"target": "tensorrt"},
    "deploy 8/8/8, centred, tensorrt": {"target": "tensorrt", "centre_values": True},
    "deploy 8/8/8, residual, tensorrt": {"target": "tensorrt", "quantize_residual": True},
    "deploy 8/8/8, float16, tensorrt": {"target": "tensorrt", "float16": True},
    "deploy fp8, tensorrt": {"target": "tensorrt", "precision": "fp8"},
    "deploy 8/8/8, pearson": {"quantizer": "deploy", "method": "pearson"},
    "deploy 6/6/6": {"quantizer": "deploy", "bits": "6/6/6"},
    "deploy 6/6/6, pearson": {"quantizer": "deploy", "bits": "6/6/6", "method": "pearson"},
    "deploy 6/6/6, ranking": {"quantizer": "deploy", "bits": "6/6/6", "method": "ranking"},
    "weights 4": {"weights": 4},
    "weights 4, gptq": {"weights": 4, "rounding": "gptq"},
    "ptq4vit 8/8/8": {"quantizer": "ptq4vit"},
    "ptq4vit 6/6/6": {"quantizer": "ptq4vit", "bits": "6/6/6"},
    "fqvit 8/8/8": {"quantizer": "fqvit"},
    "fqvit 8/8/8, LIS": {"quantizer": "fqvit", "lis": True},
    "fqvit 8/8/8, no LIS": {"quantizer": "fqvit", "lis": False},
    "fqvit 8/8/8, not rotated": {"quantizer": "fqvit", "rotate": False},
    "fqvit 8/8/4": {"quantizer": "fqvit", "bits": "8/8/4"},
    "fqvit 8/8/8, integer": {"quantizer": "fqvit", "target": "integer"},
    "fqvit 8/8/4, integer": {"quantizer": "fqvit", "bits": "8/8/4", "target": "integer"},
}


def row(path: Path, options: dict[str, Any], data: Path, images: int) -> dict[str, float | None]:
    """Quantize and measure once."""
    config = QuantizeConfig(**options, images=images, report=False)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        quantize(path, config=config, output=out, calib=data / "imagenet/calib")
        source = open_images(data / "imagenet/val", resolve_preprocess(path, config))
        truth = labels_for(source, data / "imagenet/val.txt")
        found = evaluate(out / "quantized.onnx", source, truth, reference=path)
    return {"top1": found.top1, "sqnr_db": found.sqnr_db, "agreement": found.agreement}


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared"))
    parser.add_argument("--models", default="vit,deit")
    parser.add_argument("--rows", default=None, help="only rows that contain one of these texts")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    print("| model | quantizer | arithmetic | top-1 % | SQNR dB | agreement % |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.models.split(","):
        file, preprocess = MODELS[name]
        path = options.data / "models" / file
        source = open_images(
            options.data / "imagenet/val",
            resolve_preprocess(path, QuantizeConfig(preprocess=preprocess)),
        )
        plain = evaluate(path, source, labels_for(source, options.data / "imagenet/val.txt"))
        print(f"| {name} | FP32 | float | {plain.top1:.1f} | | |", flush=True)
        results[name] = {"FP32": {"top1": plain.top1}}
        for title, extra in ROWS.items():
            if options.rows and not any(t in title for t in options.rows.split(",")):
                continue
            started = time.time()
            found = row(path, {**extra, "preprocess": preprocess}, options.data, options.images)
            arithmetic = "integer" if extra.get("target") == "integer" else "float"
            print(
                f"| {name} | {title} | {arithmetic} | {found['top1']:.1f} |"
                f" {found['sqnr_db']:.1f} | {found['agreement']:.1f} |",
                flush=True,
            )
            results[name][title] = {**found, "seconds": time.time() - started}
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
