"""Damaged labels, options and scales."""

from __future__ import annotations

import copy
import json
import math
import random
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnx
from PIL import Image

from fuzz.bytes_of import damaged
from fuzz.seeds import vit
from ptq_onnx.cli.given import settings
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.images.labels import labels_for
from ptq_onnx.images.opening import open_images
from ptq_onnx.images.preprocess import Preprocess

Call = Callable[[], object]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 8, 300, 10**12, 10**30, 0.0, -0.0, -1.5, 1e-40, 1e30, 1e308,
    math.nan, math.inf, "", "x", "true", "NaN", [], {}, [0], [[0.5]], [1.0, [2.0]], {"a": 1},
)  # fmt: skip
PIECES = ("a.png", "b/c.png", " ", "\t", "\n", "0", "1", "-1", "9" * 20, "9" * 5000, "²", "٣",
          "#", "\x00", "\ufeff", "é", "\r", "\u2028", "1.0", "1e3", "nan", "a.png 1\n")  # fmt: skip


def labels_case(rng: random.Random, folder: Path) -> Call:
    text = "a.png 0\nb/c.png 1\n" + "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 12)))
    content = text.encode()
    (folder / "labels.txt").write_bytes(damaged(content, rng) if rng.random() < 0.5 else content)
    (folder / "in/b").mkdir(parents=True)
    for name in ("a.png", "b/c.png"):
        Image.new("RGB", (20, 20), "red").save(folder / "in" / name)
    source = open_images(folder / "in", Preprocess.named("imagenet", 8))
    return lambda: labels_for(source, folder / "labels.txt", 10)


OPTIONS = tuple(QuantizeConfig.__dataclass_fields__)
SCALARS = ("x", "true", "'false'", "2001-01-01", "2001-13-45", "!!int x", "!!float y", "!!bool z",
           "!!timestamp t", "!!binary ' '", "!!set {a}", "!!python/name:os.system", "0x10", "1:30",
           "9" * 5000, "1e400", ".nan", "-.inf", "~", "", "[]", "{}", "[1, 2]", "{a: b}", "&a [*a]",
           "*b", "[" * 500, "fc2@0-99999999", "8/8/8", "4", "0.5", "-1", "0", "1e-9", "|\n  a\n  b",
           "? [a]\n  : b", "all", "auto", "/dev/zero", "\\x00", '"\\0"', "@", "%", "é")  # fmt: skip


def yaml_case(rng: random.Random, folder: Path) -> Call:
    """Options with odd values, or damaged as bytes."""
    names = (*OPTIONS, "calib", "output", "labels", "scales", "nothing", "1", "[a]", "<<", "~")
    lines = [f"{rng.choice(names)}: {rng.choice(SCALARS)}" for _ in range(rng.randint(1, 3))]
    content = "\n".join(lines).encode()
    (folder / "a.yaml").write_bytes(damaged(content, rng) if rng.random() < 0.3 else content)
    return lambda: settings(str(folder / "a.yaml"), {})


PROCESSOR: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True,
    "do_normalize": True, "do_center_crop": True, "crop_size": {"height": 8, "width": 8},
    "size": {"shortest_edge": 9}, "resample": 3, "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip


def processor_case(rng: random.Random, folder: Path) -> Call:
    """The settings of an image processor with odd values."""
    from ptq_onnx.config.hugging_face import read_processor

    data = copy.deepcopy(PROCESSOR)
    for _ in range(rng.randint(0, 3)):
        _change(data, rng)
    content = json.dumps(data).encode()
    content = damaged(content, rng) if rng.random() < 0.3 else content
    (folder / "preprocessor_config.json").write_bytes(content)
    return lambda: read_processor(folder)


@lru_cache(maxsize=4)
def made(quantizer: str) -> tuple[bytes, str]:
    """A small model and the report of its quantization."""
    from ptq_onnx.pipeline.quantize import quantize

    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder, "model.onnx"), Path(folder, "output")
        onnx.save(vit(), path)
        config = QuantizeConfig(quantizer=quantizer, report=False, images=4, threads=1)
        quantize(path, config=config, calib="noise", output=output)
        return path.read_bytes(), (output / "report.json").read_text()


def scales_case(rng: random.Random, folder: Path) -> Call:
    """A report with odd values in its numbers, used again."""
    from fuzz.cases import command

    quantizer = rng.choice(("vanilla", "fqvit", "channelwise"))
    model, text = made(quantizer)
    (folder / "model.onnx").write_bytes(model)
    data = copy.deepcopy(json.loads(text))
    for _ in range(rng.randint(0, 3)):
        _change(data if rng.random() < 0.1 else data["tensors"], rng)
    content = json.dumps(data).encode()
    content = damaged(content, rng) if rng.random() < 0.2 else content
    (folder / "report.json").write_bytes(content)
    words = ("quantize", "model.onnx", "--calib", "noise", "--images", "2", "--threads", "1")
    more = ("--quantizer", quantizer, "--scales", "report.json", "--no-report")
    return lambda: command(*words, *more)


def _change(data: Any, rng: random.Random) -> None:
    """Put an odd value somewhere, drop something, or repeat it."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(data)
    if not places:
        return
    node, key = rng.choice(places)
    what = rng.random()
    if what < 0.15:
        del node[key]
    elif what < 0.3 and isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    else:
        node[key] = copy.deepcopy(rng.choice(VALUES))
