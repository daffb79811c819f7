"""The cells: a network, a quantizer, bits and a target; what is compared, and how near it must be.

A cell is one run of ``quantize``. The oracle reads ``report.json`` and the float model named there
and computes what the numbers mean; the file runs in ONNX Runtime with all its optimizations.

* ``parts``: every tensor with codes, each part of the file given the oracle's codes (``cut.py``).
  The error is what rounding to the nearest code does not explain, against the tensor itself, in
  dB; the worst tensor counts.
* ``whole``: the file as it is, end to end. Rounding is chaotic, so a last bit can move the result
  by as much as quantization does; the file has to be as near to the float model as the oracle is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx import QuantizeConfig, quantize

from .cut import CutFile
from .formats import Coded, Format
from .networks import NETWORKS, images, write
from .reference import Reference, open_session

Array = NDArray[Any]
BITS = ("8/8/8", "8/8/4", "6/6/6", "4/4/4", "3/8/8", "8/6/8")
WIDE = ("8/16/16", "6/12/16")
PARTLY = ("k", "norm1", "fc2")
AS_IT_IS: dict[str, Any] = {"quantizer": "fqvit", "rotate": False}
"""Where a stream is turned or has searched factors is tried by ways of their own."""
WAYS: dict[str, dict[str, Any]] = {
    "vanilla/onnxruntime": {"quantizer": "vanilla"},
    "channelwise/onnxruntime": {"quantizer": "channelwise"},
    "channelwise all/onnxruntime": {"quantizer": "channelwise", "per_channel": ("all",)},
    "fqvit/onnxruntime": AS_IT_IS,
    "fqvit uniform/onnxruntime": {**AS_IT_IS, "lis": False},
    "fqvit all/onnxruntime": {**AS_IT_IS, "per_channel": ("all",)},
    "fqvit partly float/onnxruntime": {**AS_IT_IS, "keep_float": PARTLY},
    "fqvit/integer": {**AS_IT_IS, "target": "integer"},
    "fqvit uniform/integer": {**AS_IT_IS, "target": "integer", "lis": False},
    "ptq4vit/onnxruntime": {"quantizer": "ptq4vit"},
    "deploy/onnxruntime": {"quantizer": "deploy"},
    "deploy as it is/onnxruntime": {
        "quantizer": "deploy",
        "equalize": False,
        "bias_correction": False,
    },
    "deploy gptq/onnxruntime": {"quantizer": "deploy", "rounding": "gptq"},
    "deploy/tensorrt": {"target": "tensorrt"},
    "deploy residual/tensorrt": {"target": "tensorrt", "quantize_residual": True},
    "deploy fp8/tensorrt": {"target": "tensorrt", "precision": "fp8"},
    "deploy/openvino": {"target": "openvino"},
    "deploy weights 4/onnxruntime": {"weights": 4},
    "vanilla rotated/onnxruntime": {"quantizer": "vanilla", "rotate": True},
    "fqvit rotated/onnxruntime": {"quantizer": "fqvit", "rotate": True},
    "deploy rotated/onnxruntime": {"quantizer": "deploy", "rotate": True},
    "fqvit rotated/integer": {"target": "integer", "rotate": True},
    "vanilla 16/onnxruntime": {"quantizer": "vanilla"},
    "fqvit 16/onnxruntime": {**AS_IT_IS, "lis": False},
    "deploy 16/onnxruntime": {"quantizer": "deploy"},
    "fqvit residual 16/onnxruntime": {
        **AS_IT_IS,
        "more_bits": ("residual1=16", "residual2=16"),
    },
    "fqvit residual 16/integer": {
        **AS_IT_IS,
        "target": "integer",
        "more_bits": ("residual1=16", "residual2=16"),
    },
    "lowbit/onnxruntime": {"quantizer": "lowbit"},
    "lowbit narrow ends/onnxruntime": {"quantizer": "lowbit", "wide_ends": False},
    "deploy dynamic/onnxruntime": {"activations": "dynamic"},
    "deploy dynamic token/onnxruntime": {"activations": "dynamic-token"},
    "fqvit log2/onnxruntime": {"quantizer": "fqvit", "lis": True},
    "fqvit log2/integer": {"target": "integer", "lis": True},
    "lowbit trained/onnxruntime": {"quantizer": "lowbit", "reconstruct": True, "minutes": 0.02},
    "lowbit by role/onnxruntime": {
        "quantizer": "lowbit",
        "more_bits": ("fc1.weight=3", "fc2.weight@0=6", "gelu=5", "gelu@0=8", "proj.weight=2"),
    },
}
"""Options by quantizer and target."""
ONE_WIDTH = (
    "deploy fp8/tensorrt", "deploy weights 4/onnxruntime", "vanilla rotated/onnxruntime",
    "fqvit rotated/onnxruntime", "deploy rotated/onnxruntime", "fqvit rotated/integer",
    "fqvit residual 16/onnxruntime", "fqvit residual 16/integer", "deploy dynamic/onnxruntime",
    "deploy dynamic token/onnxruntime", "lowbit by role/onnxruntime",
)  # fmt: skip
"""These have one format, 8-bit floats or 4-bit weights alone, or the bits change nothing else."""
DIGITS = "digits"
ROOT = Path(__file__).resolve().parents[2]
EQUAL = 400.0
"""dB where there is no error at all."""
LEAST = 60.0
"""dB of every part where only the order of sums differs; see ``bound`` for where more does."""
NEAR, OTHERWISE = 3.0, 6.0
"""dB by which a file may be further from the float model than the oracle, where a last bit moved
a code early on and everything behind it; where kernels round otherwise (``bound``) many do."""
REFUSED = {"integer": frozenset({
    "multi_query", "grouped_query", "masked", "tied_weights", "grouped_convolution", "einsum",
    "windows", "shared_norm", "stem",
})}  # fmt: skip
"""Networks that a target refuses, in one line."""


def bound(target: str, found: Format, op: str) -> tuple[float, float]:
    """The dB that a part must have, and the most steps that its codes may be off beyond rounding;
    ``op`` makes the tensor.

    * ONNX Runtime makes QLinearSoftmax of a softmax between 8-bit codes: exponentials from a table
      of integers by code, so that a code may be off by one (over the whole table 47.96 dB and up,
      the least with 3-bit weights, 4.8 % of the codes off by one).
    * It makes QLinearConv of a convolution between codes, whose bias is a whole number of steps of
      the input times those of the weight: with 4-bit codes that is a few hundredths of a step of
      the output (measured 55.5 dB, 0.04 steps).
    * Integer softmax: exp as a polynomial of second degree on integers (I-BERT), off by at most
      0.5 % of the largest weight: of uniform codes less than one; of log2 codes one where the
      weight is large, any number where it is tiny (measured 52.0 dB and up).
    """
    if found.role == "softmax" and target == "integer":
        return (45.0, 255.0) if found.code == "log2" else (LEAST, 1.0)
    if op == "Conv" and target == "onnxruntime":
        return 50.0, 0.1
    if op == "Softmax" and target == "onnxruntime" and found.code == "uniform":
        eight = found.limits[1] - found.limits[0] == 255 and found.granularity != "row"
        return (47.0, 1.0) if eight and found.factor.ndim == 0 else (LEAST, 0.5)
    return LEAST, 0.5


@dataclass(frozen=True)
class Cell:
    """One run."""

    network: str
    way: str
    bits: str

    @property
    def name(self) -> str:
        return f"{self.network} {self.way} {self.bits}"

    @property
    def target(self) -> str:
        return self.way.rpartition("/")[2]


def bits_of(way: str) -> tuple[str, ...]:
    """The widths that a way is tried with."""
    if " 16/" in way and way not in ONE_WIDTH:
        return WIDE
    return BITS[:1] if way in ONE_WIDTH else BITS


def cells(networks: tuple[str, ...] = (DIGITS, *NETWORKS)) -> Iterator[Cell]:
    """All of them."""
    for network in networks:
        for way in WAYS:
            for bits in bits_of(way):
                yield Cell(network, way, bits)


@dataclass(frozen=True)
class Part:
    """One tensor: the file's codes against the oracle's."""

    tensor: str
    role: str
    decibels: float
    steps: float
    """The largest error beyond rounding, in steps of the codes."""
    moved: float
    """Share of codes that differ."""
    bound: tuple[float, float] = (LEAST, 0.5)


@dataclass(frozen=True)
class Result:
    """What a cell gave."""

    parts: tuple[Part, ...]
    whole: float
    """dB of the file's output against the oracle's."""
    file: float
    """dB of the file's output against the float model's."""
    oracle: float
    """dB of the oracle's."""

    def complaints(self) -> list[str]:
        """Everything that is not as near as it must be."""
        found = [
            f"{p.role} {p.tensor}: {p.decibels:.1f} dB, {p.steps:.2g} steps beyond rounding"
            for p in self.parts
            if p.decibels < p.bound[0] or p.steps > p.bound[1]
        ]
        exact = all(p.bound[0] >= LEAST and p.decibels >= LEAST for p in self.parts)
        near = NEAR if exact else OTHERWISE
        if self.whole < LEAST and self.file < self.oracle - near:
            found.append(f"file {self.file:.1f} dB of float, oracle {self.oracle:.1f}")
        return found

    @property
    def worst(self) -> Part:
        return min(self.parts, key=lambda p: p.decibels)


def run(cell: Cell, folder: Path, count: int = 4) -> Result:
    """Quantize, and compare on images that calibration did not see."""
    options = WAYS[cell.way]
    config = QuantizeConfig(
        **options, bits=cell.bits, images=16, report=False, check_preprocess=False, threads=1
    )
    model, calib, x = subject(cell.network, folder, count)
    found = quantize(model, config=config, output=folder / cell.name.replace("/", "_"), calib=calib)
    return compare(found.output, x)


def subject(network: str, folder: Path, count: int) -> tuple[Path, Any, Array]:
    """Model, calibration images, and some others."""
    if network == DIGITS:
        return ROOT / "models/digits_vit.onnx", ROOT / "img/digits/calib", digits(count)
    x = images(16 + count)
    return write(network, folder), x[:16], x[16:]


def digits(count: int) -> Array:
    """Pictures as the embedded model wants them."""
    from PIL import Image

    files = sorted((ROOT / "img/digits/val").glob("*.png"))[:count]
    pixels = np.stack([np.asarray(Image.open(f).convert("RGB"), np.float32) for f in files])
    return np.moveaxis((pixels / 255 - 0.5) / 0.5, -1, 1).astype(np.float32)


def compare(folder: Path, x: Array) -> Result:
    """A folder of ``quantize``: the file against the oracle."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    formats = {e["tensor"]: Format.of(e) for e in report["tensors"]}
    formed = folder / report["formed"]
    meant = Reference(formed, formats.values()).run(x)
    plain = (reference := Reference(formed, ())).run(x)
    file = CutFile(folder / "quantized.onnx", formats)
    codes, _ = file.run(x, meant.coded)
    target = report["config"]["target"]
    ops = {o: node.op_type for node in reference.model.graph.node for o in node.output}
    parts = [
        _part(formats[n], meant.coded[n], c, bound(target, formats[n], ops.get(n, "")))
        for n, c in codes.items()
    ]
    opened = whole(folder / "quantized.onnx", formats)
    (output,) = opened.run(None, {opened.get_inputs()[0].name: x})
    (expected,), (real,) = meant.outputs.values(), plain.outputs.values()
    end = decibels(output, expected)
    if not parts:  # weights alone: nothing is rounded on the way
        parts = [Part("output", "output", end, 0.0, 0.0)]
    return Result(
        tuple(parts),
        end,
        decibels(output, real),
        decibels(expected, real),
    )


def whole(path: Path, formats: dict[str, Format]) -> Any:
    import onnx

    floats = any(f.code == "e4m3" for f in formats.values())
    return open_session(onnx.load(path), optimize=True, floats=floats)


def _part(found: Format, coded: Coded, codes: Array, least: tuple[float, float]) -> Part:
    error = found.error(coded, codes)
    return Part(
        found.name,
        found.role,
        ratio(np.asarray(error), coded.part),
        float(found.beyond(coded, codes).max(initial=0)),
        float(np.mean(codes != coded.codes)),
        least,
    )


def decibels(found: Array, expected: Array) -> float:
    return ratio(np.asarray(found, np.float64) - expected, expected)


def ratio(error: Array, signal: Array) -> float:
    noise = float(np.sum(np.square(error, dtype=np.float64)))
    power = float(np.sum(np.square(signal, dtype=np.float64)))
    return EQUAL if noise == 0 else min(EQUAL, 10 * float(np.log10(power / noise)))
