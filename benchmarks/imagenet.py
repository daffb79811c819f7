"""FQ-ViT's table on ImageNet: top-1 of eight models under seven settings, the paper's beside ours.

    python benchmarks/imagenet.py --calib TRAIN_IMAGES --val VAL [--labels val.txt] --json FILE
    python benchmarks/imagenet.py --onnx vit.onnx,deit.onnx --calib DIR --val DIR --labels FILE

The first form exports each model with its weights from timm (network, and ImageNet, needed) and
quantizes it with 1,000 calibration images, as the paper does. It is resumable: every finished cell
is written to the JSON file, and not computed again. A row is printed as soon as its model is
finished. ``--onnx`` takes files instead, which have no figure of the paper.

Paper: FQ-ViT, arXiv 2111.13824, the results on ImageNet (full precision, then W/A/attention bits).
The baselines quantize every op, one scale per activation tensor; "ours" there is PTF and LIS.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.evaluation.evaluate import evaluate
from ptq_onnx.images.labels import labels_for
from ptq_onnx.images.opening import open_images
from ptq_onnx.pipeline.quantize import quantize, resolve_preprocess

FLOAT = "Full precision"
PLAIN = {"quantizer": "fqvit", "ptf": False, "lis": False}
SETTINGS: dict[str, dict[str, Any] | None] = {
    FLOAT: None,
    "MinMax 8/8/8": {**PLAIN, "method": "minmax"},
    "EMA 8/8/8": {**PLAIN, "method": "ema"},
    "Percentile 8/8/8": {**PLAIN, "method": "percentile"},
    "OMSE 8/8/8": {**PLAIN, "method": "omse"},
    "PTF + LIS 8/8/8": {"quantizer": "fqvit"},
    "PTF + LIS 8/8/4": {"quantizer": "fqvit", "bits": "8/8/4"},
}


@dataclass(frozen=True)
class Model:
    """timm's name of a model, and the paper's top-1 in the order of ``SETTINGS``."""

    timm: str
    paper: tuple[float, ...]


MODELS = {
    "DeiT-T": Model(
        "deit_tiny_patch16_224.fb_in1k", (72.21, 70.94, 71.17, 71.47, 71.30, 71.61, 71.07)
    ),
    "DeiT-S": Model(
        "deit_small_patch16_224.fb_in1k", (79.85, 75.05, 75.71, 76.57, 75.03, 79.17, 78.40)
    ),
    "DeiT-B": Model(
        "deit_base_patch16_224.fb_in1k", (81.85, 78.02, 78.82, 78.37, 79.57, 81.20, 80.85)
    ),
    "ViT-B": Model(
        "vit_base_patch16_224.augreg_in21k_ft_in1k",
        (84.53, 23.64, 30.30, 46.69, 73.39, 83.31, 82.68),
    ),
    "ViT-L": Model(
        "vit_large_patch16_224.augreg_in21k_ft_in1k",
        (85.81, 3.37, 3.53, 5.85, 11.32, 85.03, 84.89),
    ),
    "Swin-T": Model(
        "swin_tiny_patch4_window7_224.ms_in1k", (81.35, 64.38, 70.81, 78.78, 79.30, 80.51, 80.04)
    ),
    "Swin-S": Model(
        "swin_small_patch4_window7_224.ms_in1k", (83.20, 74.37, 75.05, 78.12, 78.96, 82.71, 82.47)
    ),
    "Swin-B": Model(
        "swin_base_patch4_window7_224.ms_in1k", (83.60, 25.58, 28.00, 40.93, 48.55, 82.97, 82.38)
    ),
}


class Results:
    """Top-1 by model and setting, in a file that is written after every one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found: dict[str, dict[str, float]] = {}
        if path is not None and path.is_file():
            self.found = json.loads(path.read_text(encoding="utf-8"))

    def get(self, model: str, setting: str) -> float | None:
        return self.found.get(model, {}).get(setting)

    def put(self, model: str, setting: str, top1: float) -> None:
        self.found.setdefault(model, {})[setting] = top1
        if self.path is not None:
            beside = self.path.with_suffix(".tmp")
            beside.write_text(json.dumps(self.found, indent=1), encoding="utf-8")
            os.replace(beside, self.path)


def measure(path: Path, setting: dict[str, Any] | None, options: argparse.Namespace) -> float:
    """Top-1 in % of the float file, or of its quantized form."""
    config = QuantizeConfig(
        **(setting or {}), images=options.images, report=False, preprocess=options.preprocess
    )
    source = open_images(options.val, resolve_preprocess(path, config), limit=options.limit)
    truth = labels_for(source, options.labels)
    with tempfile.TemporaryDirectory() as folder:
        file = path
        if setting is not None:
            quantize(path, config=config, output=Path(folder) / "out", calib=options.calib)
            file = Path(folder) / "out/quantized.onnx"
        return float(evaluate(file, source, truth).top1 or 0.0)


def row(name: str, results: Results, paper: tuple[float, ...] | None) -> str:
    """One line of the table: ours (the paper's)."""
    cells = []
    for index, setting in enumerate(SETTINGS):
        ours = results.get(name, setting)
        text = "" if ours is None else f"{ours:.2f}"
        cells.append(text if paper is None else f"{text} ({paper[index]:.2f})")
    return f"| {Path(name).stem if paper is None else name} | {' | '.join(cells)} |"


def main() -> None:
    """Measure what is missing, and print a row per model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calib", type=Path, required=True, help="calibration images")
    parser.add_argument("--val", type=Path, required=True, help="validation images")
    parser.add_argument("--labels", type=Path, help="lines 'file label'; else class folders")
    parser.add_argument("--models", default=",".join(MODELS), help="of the paper's, by name")
    parser.add_argument("--onnx", help="files to measure instead, separated by commas")
    parser.add_argument("--preprocess", help="of --onnx files that do not tell theirs")
    parser.add_argument("--images", type=int, default=1000, help="calibration images to use")
    parser.add_argument("--limit", type=int, help="validation images to use")
    parser.add_argument("--settings", help="only settings that contain this text")
    parser.add_argument("--json", type=Path, help="results so far; continued where it exists")
    options = parser.parse_args()
    results = Results(options.json)
    print(f"| model | {' | '.join(SETTINGS)} |")
    print("|---" * (len(SETTINGS) + 1) + "|", flush=True)
    names = options.onnx.split(",") if options.onnx else options.models.split(",")
    for name in names:
        missing = [
            s
            for s in SETTINGS
            if results.get(name, s) is None and (not options.settings or options.settings in s)
        ]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(name)
            if missing and not options.onnx:
                from ptq_onnx.pipeline.timm_export import export_timm

                path = export_timm(MODELS[name].timm, Path(folder) / "model.onnx")
            for setting in missing:
                results.put(name, setting, measure(path, SETTINGS[setting], options))
        print(row(name, results, None if options.onnx else MODELS[name].paper), flush=True)


if __name__ == "__main__":
    main()
