"""The target integer beside the same quantizer in float arithmetic: accuracy, time, size.

    python benchmarks/integer.py --data ../shared [--models vit,deit] [--bits 8/8/8,8/8/4]
        [--gelu polynomial]

For each model and bit widths: top-1 and SQNR of the float model, of the file with float
LayerNorm and softmax (``onnxruntime``) and of the file in integers, each in ONNX Runtime with
optimizations on; milliseconds per image, one at a time on one thread; the file's size over that
of the ``onnxruntime`` file; ops on floats inside, by the checker; what one image costs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ptq_onnx.analysis.integer_costs import integer_report
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.evaluation.evaluate import evaluate
from ptq_onnx.evaluation.network import session
from ptq_onnx.files.model_size import model_bytes
from ptq_onnx.images.labels import labels_for
from ptq_onnx.images.opening import open_images
from ptq_onnx.pipeline.quantize import quantize, read_scales, resolve_preprocess
from ptq_onnx.preparation.prepare import prepare
from ptq_onnx.targets.integer.interpreter import differing_tensors
from ptq_onnx.targets.integer.rules import violations

MODELS = {
    "vit": ("vit_tiny_patch16_224.opset14.onnx", "inception"),
    "vit-dynamo": ("vit_tiny_patch16_224.dynamo.onnx", "inception"),
    "deit": ("deit_tiny_patch16_224.opset17.onnx", "imagenet"),
}


def milliseconds(path: Path, image: np.ndarray, runs: int = 7) -> float:
    """Best of several runs of one image on one thread."""
    opened = session(path, 1)
    feed = {opened.get_inputs()[0].name: image}
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        opened.run(None, feed)
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def main() -> None:
    """Print a table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared"))
    parser.add_argument("--models", default="vit,deit")
    parser.add_argument("--bits", default="8/8/8,8/8/4")
    parser.add_argument("--images", type=int, default=128, help="calibration images")
    parser.add_argument("--gelu", default="table", choices=("table", "polynomial"))
    parser.add_argument("--exact", type=int, default=2, help="images for the interpreter")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    print("| model | file | top-1 % | SQNR dB | agreement % | ms | MB | differing | floats |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.models.split(","):
        file, preprocess = MODELS[name]
        path = options.data / "models" / file
        base = QuantizeConfig(preprocess=preprocess)
        source = open_images(options.data / "imagenet/val", resolve_preprocess(path, base))
        truth = labels_for(source, options.data / "imagenet/val.txt")
        few = [batch for batch, _ in zip(source.batches(1), range(options.exact), strict=False)]
        plain = evaluate(path, source, truth, batch_size=4)
        size = model_bytes(path) / 1e6
        speed = milliseconds(path, few[0])
        print(
            f"| {name} | FP32 | {plain.top1:.1f} | | | {speed:.0f} | {size:.2f} | | |", flush=True
        )
        for bits in options.bits.split(","):
            for target in ("onnxruntime", "integer"):
                found = measure(path, source, truth, few, options, preprocess, bits, target)
                found.update({"model": name, "bits": bits, "target": target})
                results.append(found)
                print(
                    f"| {name} | {bits} {target} | {found['top1']:.1f} | {found['sqnr_db']:.2f} |"
                    f" {found['agreement']:.1f} | {found['ms']:.0f} | {found['bytes'] / 1e6:.2f} |"
                    f" {found.get('differing', '')} | {found.get('floats', '')} |",
                    flush=True,
                )
        print(json.dumps({k: results[-1][k] for k in ("operations", "traffic", "widest")}))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def measure(
    path: Path,
    source: Any,
    truth: Any,
    few: list[np.ndarray],
    options: argparse.Namespace,
    preprocess: str,
    bits: str,
    target: str,
) -> dict[str, Any]:
    """Quantize for one target and measure the file."""
    config = QuantizeConfig(
        quantizer="fqvit",
        bits=bits,
        target=target,
        images=options.images,
        preprocess=preprocess,
        report=False,
        gelu=options.gelu if target == "integer" else "table",
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        quantize(path, config=config, output=out, calib=options.data / "imagenet/calib")
        file = out / "quantized.onnx"
        measured = evaluate(file, source, truth, reference=path, batch_size=4)
        found: dict[str, Any] = {
            "top1": measured.top1,
            "sqnr_db": measured.sqnr_db,
            "agreement": measured.agreement,
            "ms": milliseconds(file, few[0]),
            "bytes": model_bytes(file),
        }
        if target == "integer":
            model = ir.load(file)
            _, different, _ = differing_tensors(file, few)
            specs = read_scales(out / "report.json")
            costs = integer_report(prepare(path).model, specs, model, few[:1])
            found["differing"] = len(different)
            found["floats"] = len(violations(model))
            found.update({key: costs[key] for key in ("operations", "traffic", "widest")})
    return found


if __name__ == "__main__":
    main()
