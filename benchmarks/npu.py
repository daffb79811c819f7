"""Files for Qualcomm's NPU on its emulator, beside onnxruntime's own recipe: SQNR, time, size.

    python benchmarks/npu.py MODEL.onnx --calib FILE.npy --val FILE.npy [--preprocess NAME]
        [--images 64] [--count 8] [--only TEXT] [-- options of `quantize`]

CALIB and VAL hold inputs as the model takes them, [N, C, H, W] float32. Needs onnxruntime-qnn; an
image takes seconds there, and its time says nothing of a device's. The peer is
`get_qnn_qdq_config`, on the file of opset 17 for one image, min-max, weights with one scale, as it
does by default. For recognisers of text the share of equal strings is printed too.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray

import ptq_onnx  # noqa: F401  (switches off onnxruntime's telemetry, before that is loaded)

# isort: split
import onnxruntime as ort
from ocr import Reader, strings
from onnxruntime.quantization import QuantType, quantize
from onnxruntime.quantization.execution_providers.qnn import (
    get_qnn_qdq_config,
    qnn_preprocess_model,
)
from typer.testing import CliRunner

from ptq_onnx.cli.app import app
from ptq_onnx.errors import PtqError
from ptq_onnx.targets.qnn.session import npu_session

Array = NDArray[np.float32]
OURS = {
    "8/16/16": ("--bits", "8/16/16"),
    "mixed": (),
    "8/8/8": ("--bits", "8/8/8", "--no-mixed"),
}
PEERS = {"recipe, uint16": QuantType.QUInt16, "recipe, uint8": QuantType.QUInt8}


def outputs(session: ort.InferenceSession, inputs: Array) -> Array:
    """The first output of every input, one at a time."""
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: one[None]})[0] for one in inputs])


def on_cpu(path: Path) -> ort.InferenceSession:
    """The file in ONNX Runtime, on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def decibels(expected: Array, found: Array) -> float:
    """SQNR of all numbers together."""
    noise = np.square((expected - found).astype(np.float64)).sum()
    return float(10 * np.log10(np.square(expected.astype(np.float64)).sum() / max(noise, 1e-30)))


def peer(model: Path, kind: QuantType, calib: Array, folder: Path) -> Path:
    """onnxruntime's recipe for the NPU."""
    loaded = onnx.load(str(model))
    fixed, ready, out = (folder / f"peer_{n}.onnx" for n in ("fixed", "ready", "quantized"))
    for dim, size in zip(
        loaded.graph.input[0].type.tensor_type.shape.dim, (1, *calib.shape[1:]), strict=True
    ):
        dim.dim_value = size
    loaded = onnx.version_converter.convert_version(loaded, 17)
    del loaded.graph.value_info[:], loaded.metadata_props[:]  # its own code stumbles over those
    onnx.save(onnx.shape_inference.infer_shapes(loaded, data_prop=True), str(fixed))
    changed = qnn_preprocess_model(str(fixed), str(ready), fuse_layernorm=True)
    source = ready if changed else fixed
    reader = Reader(loaded.graph.input[0].name, calib)
    config = get_qnn_qdq_config(
        str(source), reader, activation_type=kind, weight_type=QuantType.QUInt8
    )
    quantize(str(source), str(out), config)
    return out


def ours(given: argparse.Namespace, folder: Path, options: tuple[str, ...]) -> Path:
    """Our file, made by the command."""
    out = folder / "ours"
    shutil.rmtree(out, ignore_errors=True)
    command = ["quantize", str(given.model), "--calib", str(given.calib), "--output", str(out)]
    command += ["--images", str(given.images), "--threads", "1", "--no-report", "--target", "qnn"]
    if given.preprocess:
        command += ["--preprocess", given.preprocess]
    size = "x".join(map(str, np.load(given.calib, mmap_mode="r").shape[-2:]))
    done = CliRunner().invoke(app, [*command, "--size", size, *options, *given.rest])
    if done.exception is not None:
        raise done.exception
    print(*(line for line in done.output.splitlines() if line.startswith("note: ")), sep="\n")
    return out / "quantized.onnx"


def row(name: str, path: Path, inputs: Array, reference: Array) -> str:
    """What the emulator makes of a file, or why it does not take it."""
    cpu = decibels(reference, outputs(on_cpu(path), inputs))
    size, start = path.stat().st_size / 1e6, time.perf_counter()
    try:
        session = npu_session(path, threads=1)
    except PtqError as error:
        return f"{name}: {cpu:.1f} dB on the CPU, {size:.2f} MB, refused: {error}"
    compiled, start = time.perf_counter() - start, time.perf_counter()
    found = outputs(session, inputs)
    each = (time.perf_counter() - start) / len(inputs)
    text = f"{name}: {decibels(reference, found):.1f} dB on the emulator, {cpu:.1f} on the CPU"
    if reference.ndim == 3:
        pairs = list(zip(strings(reference), strings(found), strict=True))
        text += f", {100 * np.mean([a == b for a, b in pairs]):.1f} % of strings"
    return f"{text}, compiled in {compiled:.1f} s, {each:.1f} s an image, {size:.2f} MB"


def main() -> None:
    """Print a row for each file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--preprocess", default="")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given = parser.parse_args(sys.argv[1:at])
    given.rest = sys.argv[at + 1 :]
    inputs = np.load(given.val)[: given.count]
    calib = np.load(given.calib, mmap_mode="r")[: given.images]
    reference = outputs(on_cpu(given.model), inputs)
    with tempfile.TemporaryDirectory() as folder:
        for name in [n for n in (*OURS, *PEERS) if given.only in n]:
            try:
                if name in OURS:
                    path = ours(given, Path(folder), OURS[name])
                else:
                    path = peer(given.model, PEERS[name], np.asarray(calib), Path(folder))
                print(row(name, path, inputs, reference), flush=True)
            except Exception as error:  # the peer's have no common base class
                print(f"{name}: fails: {error}", flush=True)


if __name__ == "__main__":
    main()
