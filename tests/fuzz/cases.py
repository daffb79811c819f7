"""A case by its kind and seed: what it writes into its folder, and what is then run."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

from fuzz import files, texts
from fuzz.bytes_of import damaged
from fuzz.edits import edit_graph
from fuzz.fields import change_fields
from fuzz.oracle import Outcome, judge
from fuzz.parity import check_parity
from fuzz.seeds import DIGITS, seed_model

Call = Callable[[], object]
QUANTIZERS = ("vanilla", "channelwise", "fqvit", "deploy")
TARGETS = ("onnxruntime", "onnxruntime", "tensorrt", "openvino", "integer")


def run_case(kind: str, seed: int, folder: Path) -> Outcome:
    """Make the case in an empty folder and judge it."""
    call = KINDS[kind](random.Random(f"{kind} {seed}"), folder)
    return judge(call, folder)


def command(*words: object) -> None:
    """A command of the command line, in this process."""
    from ptq_onnx.cli.app import main

    before = sys.argv
    sys.argv = ["ptq-onnx", *map(str, words)]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        sys.argv = before


def damaged_model(rng: random.Random, level: str) -> bytes:
    """The bytes of a small model with damage at one level."""
    if level == "bytes":
        whole = DIGITS.read_bytes() if rng.random() < 0.1 else seed_model(rng).SerializeToString()
        return damaged(whole, rng)
    model = seed_model(rng)
    {"fields": change_fields, "graph": edit_graph}[level](model, rng)
    return model.SerializeToString()


def _model(level: str) -> Callable[[random.Random, Path], Call]:
    def make(rng: random.Random, folder: Path) -> Call:
        (folder / "model.onnx").write_bytes(damaged_model(rng, level))
        words = quantize_words(rng) if rng.random() < 0.4 else ("inspect", "model.onnx")
        return lambda: run_model(folder, words)

    return make


def quantize_words(rng: random.Random) -> tuple[object, ...]:
    """A short quantization, with a report every third time."""
    words = ["quantize", "model.onnx", "--calib", "noise", "--images", "4", "--threads", "1"]
    target = rng.choice(TARGETS)
    words += ["--target", target]
    if target == "onnxruntime":
        words += ["--quantizer", rng.choice(QUANTIZERS)]
    report = ["--analysis-images", "2"] if rng.random() < 0.3 else ["--no-report"]
    words += ["--rotate"] if rng.random() < 0.3 else []
    return (*words, *report)


def run_model(folder: Path, words: tuple[object, ...]) -> None:
    """The command, then the fused model beside the original."""
    command(*words)
    original = folder / "model.onnx"
    if (folder / "output/fused.onnx").exists():
        check_parity(original, str(folder / "output/fused.onnx"))
        return
    from ptq_onnx import prepare
    from ptq_onnx.errors import PtqError
    from ptq_onnx.preparation import model_files as graph

    try:
        prepared = prepare(original)
    except PtqError:  # inspect shows more than can be quantized
        return
    check_parity(original, graph.serialize(prepared.model))


KINDS: dict[str, Callable[[random.Random, Path], Call]] = {
    "model-bytes": _model("bytes"),
    "model-fields": _model("fields"),
    "model-graph": _model("graph"),
    "image": files.image_case,
    "npy": files.npy_case,
    "npz": files.npz_case,
    "labels": texts.labels_case,
    "yaml": texts.yaml_case,
    "processor": texts.processor_case,
    "scales": texts.scales_case,
}
