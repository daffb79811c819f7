"""A large model quantized beside onnxruntime's own recipe: seconds, memory, closeness.

    python benchmarks/large.py [--timm vit_large_patch16_224] [--images 64] [--calib DIR]
        [--work DIR]

timm's network with random weights, on images of a folder or on Gaussian ones.
Each tool runs in a process of its own on one core: seconds by the clock and of the processor,
the most memory that it had, and SQNR against the float file on 8 images that neither saw. Ours is
`deploy` without a report; the peer is `quant_pre_process` and `quantize_static`, U8S8 per channel,
min-max, every op that it knows.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
APART = 8


def batches(calib: str | None, count: int, size: int, seed: int = 0) -> Iterator[Array]:
    """Model inputs, one at a time."""
    if calib is None:
        rng = np.random.default_rng(seed)
        for _ in range(count):
            yield rng.standard_normal((1, 3, size, size), dtype=np.float32)
        return
    from ptq_onnx.images.opening import open_images
    from ptq_onnx.images.preprocess import Preprocess

    yield from open_images(calib, Preprocess.named("inception", size), count).batches(1)


def ours(model: Path, output: Path, given: argparse.Namespace) -> None:
    """`deploy`, in its default form."""
    import ptq_onnx

    images: Any = list(batches(given.calib, given.images, given.size))
    ptq_onnx.quantize(
        model, calib=[one[0] for one in images], output=output.parent / "ours", report=False,
        images=given.images, threads=1, check_preprocess=False, size=given.size,
    )  # fmt: skip
    (output.parent / "ours" / "quantized.onnx").rename(output)


def peer(model: Path, output: Path, given: argparse.Namespace) -> None:
    """onnxruntime's recipe."""
    import ptq_onnx  # noqa: F401  (switches off onnxruntime's telemetry)

    # isort: split
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnx.load(str(model), load_external_data=False).graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        feeds = ({name: one} for one in batches(given.calib, given.images, given.size))

        def get_next(self) -> dict[str, Array] | None:
            return next(self.feeds, None)

    prepared = output.with_suffix(".prepared.onnx")
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(output), Reader(), per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


TOOLS = {"ptq_onnx deploy": ours, "onnxruntime quantize_static": peer}


def measured(tool: str, given: argparse.Namespace, model: Path, output: Path) -> dict[str, float]:
    """One tool in a process of its own."""
    words = ["--tool", tool, "--model", str(model), "--output", str(output)]
    words += ["--images", str(given.images), "--size", str(given.size)]
    words += [] if given.calib is None else ["--calib", given.calib]
    done = subprocess.run(
        [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one_tool(given: argparse.Namespace) -> None:
    """What the process of a tool does."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    logging.disable(logging.WARNING)
    started = time.perf_counter()
    TOOLS[given.tool](Path(given.model), Path(given.output), given)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {"seconds": time.perf_counter() - started, "cpu": used.ru_utime + used.ru_stime,
             "peak": used.ru_maxrss * 1024}
        )
    )  # fmt: skip


def outputs(path: Path, given: argparse.Namespace) -> Array:
    """The first output on images that calibration did not see."""
    from ptq_onnx.evaluation.network import session

    opened = session(path, 1, cpu=True)
    name = opened.get_inputs()[0].name
    seen = list(batches(given.calib, given.images + APART, given.size, seed=1))[-APART:]
    return np.concatenate([opened.run(None, {name: one})[0] for one in seen])


def main() -> None:
    """Print a row for each tool."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--timm", default="vit_large_patch16_224", help="a name of timm's")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--calib", help="a folder of images; else Gaussian ones")
    parser.add_argument("--work", type=Path, help="a folder that keeps the models")
    parser.add_argument("--tool", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tool:
        one_tool(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        model = work / f"{given.timm}.onnx"
        if not model.is_file():
            from hybrids import export

            export(given.timm, model)
        reference = outputs(model, given)
        print(f"{given.timm}, {model.stat().st_size / 1e6:.0f} MB, {given.images} images")
        for number, tool in enumerate(TOOLS):
            file = work / f"{number}.onnx"
            found = measured(tool, given, model, file)
            noise = np.sum((reference - outputs(file, given)) ** 2)
            sqnr = 10 * np.log10(np.sum(reference**2) / max(float(noise), 1e-30))
            print(
                f"{tool:28} {found['seconds']:7.1f} s ({found['cpu']:.1f} of the processor),"
                f" {found['peak'] / 1e9:.2f} GB, {sqnr:.1f} dB, {file.stat().st_size / 1e6:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
