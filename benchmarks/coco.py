"""FQ-ViT's rows on COCO: box AP of a detector's ONNX file, float and quantized.

    python benchmarks/coco.py --model DETECTOR.onnx --coco DIR --work FOLDER [--paper]

DIR holds annotations/instances_val2017.json, val2017/ and, to calibrate on, train2017/ (or
--calib). The boxes that are found go back into each picture's own pixels and are judged by COCO's
rules, by what `--metric detection` computes with; its options (--metric-option) name the outputs
and what they hold. For mmdeploy's files of Swin with (Cascade) Mask R-CNN: --metric-option
boxes=dets --metric-option classes=order. Masks are not judged.

It is resumable: each picture's boxes are a line of a file in --work, bound to the content of the
model and to all that changes boxes. A run that was killed is taken up behind its last whole line.

Paper: FQ-ViT, arXiv 2111.13824: 50.8 mAP of Swin-S with Cascade Mask R-CNN at 8/8/4. --paper
measures its settings of numbers, those of benchmarks/imagenet.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from imagenet import FLOAT, SETTINGS
from numpy.typing import NDArray
from PIL import Image

from ptq_onnx.cli.console import one_line_errors
from ptq_onnx.config.metric_options import metric_options
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.evaluation.metrics.detection import Boxes, Detection, annotated, average_precision
from ptq_onnx.evaluation.metrics.targets import Targets
from ptq_onnx.evaluation.network import Network
from ptq_onnx.images.opening import open_images
from ptq_onnx.images.preprocess import Preprocess, from_image, open_picture, resampling
from ptq_onnx.pipeline.preprocess_input import Given
from ptq_onnx.pipeline.preprocessing import resolve_preprocess
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.sweep.fingerprint import of_model

FIGURES = {"box AP": "mAP", "AP@50": "mAP@50", "AP@75": "mAP@75"}


@dataclass(frozen=True)
class Fitting:
    """A picture as the model's input, and boxes back again. ``letterbox``: its shape is kept, and
    ``fill`` is around it, to the right and below or (``centre``) on all sides; else both sides are
    resized."""

    preprocess: Preprocess
    letterbox: bool
    centre: bool
    fill: tuple[int, ...]

    def place(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Width and height of the resized picture, and where it lies in the input."""
        down, across = self.preprocess.size
        if not self.letterbox:
            return across, down, 0, 0
        ratio = min(across / width, down / height)
        new = max(1, round(width * ratio)), max(1, round(height * ratio))
        left, top = ((across - new[0]) // 2, (down - new[1]) // 2) if self.centre else (0, 0)
        return *new, left, top

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """float32 [C, H, W]."""
        mode = "RGB" if self.preprocess.channels == 3 else "L"
        width, height, left, top = self.place(*image.size)
        size = width, height
        resized = image.convert(mode).resize(size, resampling(self.preprocess))
        ground = Image.new(mode, self.preprocess.size[::-1], self.fill if mode == "RGB" else 0)
        ground.paste(resized, (left, top))
        return from_image(ground, self.preprocess)

    def back(self, boxes: Boxes, size: tuple[int, int]) -> Boxes:
        """Boxes of the input in pixels of a picture (width, height), cut at its edges."""
        width, height, left, top = self.place(*size)
        scale = np.array([width / size[0], height / size[1]] * 2, np.float32)
        corners = (boxes.corners - np.array([left, top] * 2, np.float32)) / scale
        corners = np.clip(corners, 0, np.array([*size] * 2, np.float32))
        return Boxes(corners, boxes.scores, boxes.classes, boxes.crowd)


class Found:
    """The boxes of each picture, lines of a file that is added to."""

    def __init__(self, path: Path) -> None:
        self.path, self.boxes = path, dict[str, Boxes]()
        if not path.exists():
            return
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        for line in whole.splitlines():
            one = json.loads(line)
            parts = (one["corners"], one["scores"], one["classes"])
            self.boxes[one["image"]] = _boxes(*parts)
        if torn:
            os.truncate(path, path.stat().st_size - len(torn))

    def add(self, named: dict[str, Boxes]) -> None:
        """Write the boxes of some pictures, a line each."""
        lines = [
            json.dumps(
                {"image": name, "corners": one.corners.tolist(), "scores": one.scores.tolist(),
                 "classes": one.classes.tolist()}
            )
            for name, one in named.items()
        ]  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
        self.boxes |= named


def _boxes(corners: Any, scores: Any, classes: Any) -> Boxes:
    rows = np.array(corners, np.float32).reshape(-1, 4)
    none = np.zeros(len(rows), bool)
    return Boxes(rows, np.array(scores, np.float32), np.array(classes, np.int64), none)


def detect(
    model: Path, names: Sequence[str], truth: Targets, fitting: Fitting, given: argparse.Namespace
) -> list[Boxes]:
    """What a file finds in each picture, in the picture's pixels; only what no run found yet is
    computed. Raises PtqError."""
    options = metric_options(tuple(given.metric_option))
    key = json.dumps([of_model(str(model)), repr(fitting), sorted(options.items()), given.batch])
    kept = Found(given.work / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl")
    missing = {os.path.abspath(_pictures(given) / n): n for n in names if n not in kept.boxes}
    if missing:
        network = Network(model, given.threads)
        network.check(fitting.preprocess.shape)
        metric = Detection(options, truth, input_size=fitting.preprocess.size)
        source = open_images(list(missing), fitting.preprocess, transform=fitting)
        for files, batch in source.named_batches(given.batch):
            own = [missing[file] for file in files]
            found = metric.found(own, network(batch))
            pairs = zip(own, found, strict=True)
            kept.add({n: fitting.back(boxes, truth.size(n)) for n, boxes in pairs})
        for guess in metric.guessed:
            print(f"{model}: {guess}", file=sys.stderr)
    unread = [name for name in names if name not in kept.boxes]
    if unread:
        raise ImageError(f"Image '{_pictures(given) / unread[0]}' cannot be read.")
    return [kept.boxes[name] for name in names]


def quantized(setting: dict[str, Any], fitting: Fitting, given: argparse.Namespace) -> Path:
    """The quantized file, which is kept as well."""
    config = QuantizeConfig(
        **setting, images=given.images, report=False, check_preprocess=False, threads=given.threads,
        size=fitting.preprocess.size,
    )  # fmt: skip
    calib = given.calib or given.coco / "train2017"
    parts = [of_model(str(given.model)), repr(fitting), asdict(config), str(calib.resolve())]
    output = given.work / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    file = output / "quantized.onnx"
    if not file.is_file():
        pictures = Given(values=fitting.preprocess, transform=fitting)
        quantize(given.model, config=config, output=output, calib=calib, given=pictures)
    return file


def _pictures(given: argparse.Namespace) -> Path:
    return given.coco / given.split


def _names(truth: Targets, limit: int | None) -> list[str]:
    """The pictures, spread evenly where they are limited."""
    names = truth.images
    count = len(names) if limit is None else min(limit, len(names))
    return [names[i * len(names) // count] for i in range(count)]


def _truth(given: argparse.Namespace, preprocess: Preprocess) -> tuple[Targets, list[str]]:
    """COCO's annotations, and the pictures to look at. Raises ImageError."""
    path = given.coco / "annotations" / f"instances_{given.split}.json"
    if not path.is_file():
        raise ImageError(f"'{path}' does not exist: --coco names COCO's folder, --split its part.")
    truth = Targets(path, [], preprocess)
    names = _names(truth, given.limit)
    absent = next((n for n in names if not (_pictures(given) / n).is_file()), None)
    if absent is not None or not names:
        where = _pictures(given) / (absent or "")
        raise ImageError(f"'{where}' does not exist: expected a picture for each of '{path}'.")
    with_picture = _pictures(given) / names[0]
    if open_picture(with_picture).size != truth.size(names[0]):
        raise ImageError(f"'{with_picture}' is not of the size that '{path}' says.")
    return truth, names


def _fitting(given: argparse.Namespace) -> Fitting:
    config = QuantizeConfig(
        preprocess=given.preprocess, size=given.size, interpolation=given.interpolation
    )
    preprocess = resolve_preprocess(given.model, config)
    if given.fill == "mean":
        fill = tuple(round(255 * mean) for mean in preprocess.mean)
    else:
        fill = (int(given.fill),) * preprocess.channels
    return Fitting(preprocess, given.resize == "letterbox", given.pad == "centre", fill)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _fill(text: str) -> str:
    return text if text == "mean" else str(min(255, max(0, int(text))))


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--model", type=Path, required=True, help="a detector's ONNX file")
    made.add_argument("--coco", type=Path, required=True, help="COCO's folder")
    made.add_argument("--split", default="val2017", help="the part to measure on")
    made.add_argument("--calib", type=Path, help="calibration images (COCO's train2017)")
    made.add_argument("--work", type=Path, required=True, help="where files and boxes are kept")
    made.add_argument("--quantizer", default="deploy,fqvit", help="names, by commas")
    made.add_argument("--bits", default="8/8/8")
    made.add_argument("--target", default="onnxruntime")
    made.add_argument("--paper", action="store_true", help="FQ-ViT's settings instead")
    made.add_argument("--resize", choices=("letterbox", "squash"), default="letterbox")
    made.add_argument("--pad", choices=("corner", "centre"), default="corner")
    made.add_argument("--fill", type=_fill, default="mean", help="mean, or 0 to 255")
    made.add_argument("--size", type=_size, help="HxW, where the model's input is dynamic")
    made.add_argument("--preprocess", help="imagenet, inception, none or a folder")
    made.add_argument("--interpolation", default="bilinear")
    made.add_argument("--metric-option", action="append", default=[], metavar="KEY=VALUE")
    made.add_argument("--images", type=int, default=128, help="calibration images to use")
    made.add_argument("--limit", type=int, help="pictures to measure on")
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--threads", type=int, default=0)
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is missing, and print a row per file."""
    given = parser().parse_args(words)
    if not given.model.is_file():
        raise ConfigError(f"--model {given.model} does not exist: expected an .onnx file.")
    fitting = _fitting(given)
    truth, names = _truth(given, fitting.preprocess)
    there = [annotated(truth.boxes(name)) for name in names]
    settings: dict[str, dict[str, Any] | None] = {FLOAT: None}
    if given.paper:
        settings = SETTINGS
    else:
        settings |= {
            f"{name} {given.bits}": {"quantizer": name, "bits": given.bits, "target": given.target}
            for name in given.quantizer.split(",")
        }
    print(f"| {len(names)} pictures | {' | '.join(FIGURES)} |\n|---|{'---|' * len(FIGURES)}")
    for name, setting in settings.items():
        file = given.model if setting is None else quantized(setting, fitting, given)
        found = average_precision(there, detect(file, names, truth, fitting, given))
        cells = [found[figure] for figure in FIGURES.values()]
        shown = " | ".join("" if math.isnan(c) else f"{c:.2f}" for c in cells)
        print(f"| {name} | {shown} |", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
