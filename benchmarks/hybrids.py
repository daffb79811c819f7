"""`deploy` on hybrids of convolutions and attention: share in integers, SQNR and speed.

    python benchmarks/hybrids.py [--models NAME …] [--calib ../shared/imagenet/calib]
        [--images 32] [--seconds 3] [--work FOLDER]

timm's networks with random weights, BatchNorm's statistics taken from noise: what they compute
means nothing, so that SQNR and speed count and accuracy does not. Each is exported once to the
folder, quantized, and timed interleaved with its float model, batch 1, one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ptq_onnx  # noqa: F401  (switches off onnxruntime's telemetry, before that is loaded)

# isort: split
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.evaluation.evaluate import evaluate
from ptq_onnx.images.opening import open_images
from ptq_onnx.pipeline.preprocessing import resolve_preprocess
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.targets.timing.benchmark import benchmark
from ptq_onnx.targets.timing.runtimes import open_runtime

MODELS = (
    "mobilevit_xxs", "mobilevitv2_050", "efficientvit_b0", "fastvit_t8", "edgenext_xx_small",
    "levit_128s", "repvit_m0_9", "tiny_vit_5m_224", "efficientformerv2_s0", "coatnet_nano_rw_224",
)  # fmt: skip
KEPT: list[Any] = []


def torchvision_schemas() -> None:
    """Two operators that torchvision wants and that a torch without CUDA may lack."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    KEPT.append(library)


def export(name: str, path: Path) -> None:
    """The network with seeded random weights, opset 17, any batch size."""
    torchvision_schemas()
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, exportable=True)
    side = model.default_cfg["input_size"][-1]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train()
        for _ in range(2):
            model(torch.randn(8, 3, side, side))
        model.eval()
        torch.onnx.export(
            model, (torch.randn(2, 3, side, side),), str(path), dynamo=False, opset_version=17,
            input_names=["input"], output_names=["logits"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
        )  # fmt: skip


def main() -> None:
    """Print a row for each network."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--calib", type=Path, default=Path("../shared/imagenet/calib"))
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--work", type=Path, help="a folder that keeps the models")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        for name in given.models:
            path = work / f"{name}.onnx"
            if not path.exists():
                export(name, path)
            config = QuantizeConfig(
                images=given.images, preprocess="imagenet", report=False, check_preprocess=False,
                threads=1,
            )  # fmt: skip
            made = quantize(path, config=config, output=Path(folder) / name, calib=given.calib)
            file = Path(folder) / name / "quantized.onnx"
            preprocess = resolve_preprocess(path, config)
            few = open_images(given.calib, preprocess, limit=2 * given.images)
            quality = evaluate(file, few, None, reference=path).sqnr_db
            timed = benchmark(
                [path, file], open_runtime("onnxruntime"), batches=(1,), threads=1,
                seconds=given.seconds,
            )  # fmt: skip
            speed = next(t.speedup for t in timed.timings if Path(t.path) == file)
            covered = made.report["coverage"]
            convs = covered["convolutions"]
            size = path.stat().st_size / max(file.stat().st_size, 1)
            print(
                f"{name}: {covered['percent']:.1f} % of MACs, {convs['integer']} of"
                f" {convs['all']} convolutions, {quality:.1f} dB, {np.float64(speed):.2f}x,"
                f" {size:.1f} times smaller",
                flush=True,
            )


if __name__ == "__main__":
    main()
