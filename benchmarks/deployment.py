"""`deploy` beside onnxruntime's own best recipe, on one model: SQNR, top-1, time and speed.

    python benchmarks/deployment.py MODEL.onnx --data ../shared --preprocess inception [--no-val]
        [--nncf PYTHON] [--runtime openvino]

The peer is `quantize_static`, U8S8 per channel, min-max, inputs of the products only, after its
own `quant_pre_process`. Both get the same calibration images and run on the same validation
images and, interleaved, on the same threads. `--no-val`: for random weights, speed alone.
`--nncf`: an interpreter that has nncf, whose file joins in. `--runtime openvino`: our file is the
one for OpenVINO, and all are timed there.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import ptq_onnx  # noqa: F401  (switches off onnxruntime's telemetry, before that is loaded)

# isort: split
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.evaluation.evaluate import evaluate
from ptq_onnx.images.labels import labels_for
from ptq_onnx.images.opening import open_images
from ptq_onnx.pipeline.preprocessing import resolve_preprocess
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.targets.timing.benchmark import benchmark
from ptq_onnx.targets.timing.runtimes import open_runtime

PRODUCTS = ["Conv", "MatMul", "Gemm"]


NNCF = """
import sys
import numpy as np
import nncf
import onnx

model, images, output = sys.argv[1:]
loaded = onnx.load(model)
name = loaded.graph.input[0].name
pictures = np.load(images, mmap_mode="r")
quantized = nncf.quantize(
    loaded,
    nncf.Dataset(pictures, lambda picture: {name: np.array(picture[None])}),
    subset_size=len(pictures),
    model_type=nncf.ModelType.TRANSFORMER,
    target_device=nncf.TargetDevice.CPU,
)
onnx.save(quantized, output)
"""


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Images one at a time, as the peer wants them."""

    def __init__(self, name: str, source: Any) -> None:
        self.name, self.batches = name, source.batches(1)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next image, or None at the end."""
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch}


def peer(model: Path, output: Path, source: Any) -> None:
    """onnxruntime's recipe."""
    prepared = output.with_suffix(".prepared.onnx")
    quant_pre_process(str(model), str(prepared))
    quantize_static(
        str(prepared),
        str(output),
        Reader("input", source),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=PRODUCTS,
        extra_options={"OpTypesToExcludeOutputQuantization": PRODUCTS},
    )


def nncf(python: Path, model: Path, output: Path, source: Any) -> None:
    """nncf's file, made by an interpreter that has it."""
    images = output.with_suffix(".npy")
    np.save(images, np.concatenate(list(source.batches(8))))
    command = [str(python), "-c", NNCF, str(model), str(images), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python}: nncf fails: {done.stderr[-500:]}")


def main() -> None:
    """Print a row for each file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared"))
    parser.add_argument("--preprocess", default="inception")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--no-val", action="store_true")
    parser.add_argument("--nncf", type=Path, metavar="PYTHON")
    parser.add_argument("--runtime", choices=("onnxruntime", "openvino"), default="onnxruntime")
    options = parser.parse_args()
    config = QuantizeConfig(
        quantizer="deploy",
        target=options.runtime,
        images=options.images,
        preprocess=options.preprocess,
        report=False,
        check_preprocess=False,
    )
    calib = options.data / "imagenet/calib"
    preprocess = resolve_preprocess(options.model, config)
    with tempfile.TemporaryDirectory() as folder:
        files = {"FP32": options.model}
        started = time.perf_counter()
        quantize(options.model, config=config, output=Path(folder) / "out", calib=calib)
        ours = time.perf_counter() - started
        files["deploy"] = Path(folder) / "out/quantized.onnx"
        files["onnxruntime"] = Path(folder) / "peer.onnx"
        started = time.perf_counter()
        source = open_images(calib, preprocess, limit=options.images)
        peer(options.model, files["onnxruntime"], source)
        theirs = time.perf_counter() - started
        if options.nncf is not None:
            files["nncf"] = Path(folder) / "nncf.onnx"
            source = open_images(calib, preprocess, limit=options.images)
            nncf(options.nncf, options.model, files["nncf"], source)
        print(f"quantizing, {options.images} images: deploy {ours:.1f} s, peer {theirs:.1f} s")
        if not options.no_val:
            val = open_images(options.data / "imagenet/val", preprocess)
            truth = labels_for(val, options.data / "imagenet/val.txt")
            for name, path in files.items():
                found = evaluate(path, val, truth, reference=options.model)
                print(f"{name}: top-1 {found.top1:.1f} %, SQNR {found.sqnr_db:.1f} dB", flush=True)
        timed = benchmark(
            list(files.values()),
            open_runtime(options.runtime),
            batches=(1, 8),
            threads=options.threads,
            seconds=options.seconds,
        )
        names = {str(path): name for name, path in files.items()}
        for timing in timed.timings:
            print(
                f"{names.get(str(timing.path), timing.path)}, batch {timing.batch},"
                f" {options.threads} threads: {timing.median_ms:.1f} ms, {timing.speedup:.2f}x"
            )


if __name__ == "__main__":
    main()
