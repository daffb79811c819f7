"""`deploy` beside onnxruntime's own recipe on a text recogniser: strings, SQNR, share and speed.

    python benchmarks/ocr.py MODEL.onnx [--lines 400] [--further 1400] [--seconds 4] [--keep FOLDER]

MODEL is PP-OCRv4's recognition, `ch_PP-OCRv4_rec_infer.onnx` of the wheel rapidocr-onnxruntime
1.4.4, or any other that reads lines of 48 × 320 pixels and ends in a CTC softmax. The lines are
drawn here: words, numbers and codes, in every font that is found, of several sizes, inks, slants,
blurs and noises; the even ones calibrate, the odd ones measure, and so do ``--further`` ones.
`deploy` is measured twice, by itself and with ``--convolutions``. A string counts where all of its
characters are those that the float model reads; spaces at the ends, which depend on how closely
a line is cut out, are also left aside. The peer is `quantize_static`, U8S8 per channel,
min-max, once with every op that it knows and once with products alone.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import ptq_onnx  # noqa: F401  (switches off onnxruntime's telemetry, before that is loaded)

# isort: split
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from ptq_onnx.analysis.coverage import measure_coverage
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.targets.timing.interleaving import interleave

Array = NDArray[np.float32]

HEIGHT, WIDTH = 48, 320
WORDS = """
harbour signal morning copper invoice window garden bridge quiet motor paper yellow station
number delivery address winter summer river mountain letter orange total amount customer
account service street market energy history printer silver ticket record balance receipt
Berlin Madrid Oslo Kyoto Lima Cairo Monday Friday October March North South Room Gate Table
"""
FOLDERS = ("/usr/share/fonts", "/Library/Fonts", "C:/Windows/Fonts")

OTHER_SIGNS = ("math", "emoji", "stix", "cm", "lastresort", "display", "symbol")
"""In names of fonts without letters."""


def fonts() -> list[Path]:
    """Fonts with Latin letters: the machine's, and matplotlib's where it is installed."""
    places = [Path(folder) for folder in FOLDERS]
    try:
        import matplotlib

        places.append(Path(matplotlib.get_data_path()) / "fonts/ttf")
    except ImportError:
        pass
    found = {p.name: p for place in places for p in sorted(place.rglob("*.ttf"))}
    named = [found[name] for name in sorted(found)]
    return [p for p in named if not any(s in p.name.lower() for s in OTHER_SIGNS)]


def text(rng: np.random.Generator) -> str:
    """A few words, a date, a price, a code or an address."""
    kind, word = rng.integers(6), lambda: str(rng.choice(WORDS.split()))
    if kind == 0:
        return f"{rng.integers(1, 32):02d}.{rng.integers(1, 13):02d}.{rng.integers(1990, 2031)}"
    if kind == 1:
        return f"{word().title()} {rng.integers(1, 10000) / 100:.2f}"
    if kind == 2:
        letters = "".join(rng.choice(list("ABCDEFGHKLMNPRSTUVWXYZ"), 3))
        return f"{letters}-{rng.integers(1000, 99999)}"
    if kind == 3:
        return f"{word()}@{word()}.com".lower()
    return " ".join(word() for _ in range(rng.integers(1, 4)))


def line(rng: np.random.Generator, files: list[Path]) -> Array:
    """One drawn line as the network takes it: [3, 48, 320], −1 to 1, padded with 0."""
    font = ImageFont.truetype(str(rng.choice([str(f) for f in files])), int(rng.integers(16, 56)))
    written = text(rng)
    left, top, right, bottom = font.getbbox(written)
    margin = int(rng.integers(2, 10))
    size = (int(right - left) + 2 * margin, int(bottom - top) + 2 * margin)
    paper, ink = rng.integers(150, 256, 3), rng.integers(0, 110, 3)
    if rng.random() < 0.25:
        paper, ink = ink, paper
    image = Image.new("RGB", size, tuple(int(c) for c in paper))
    at = (margin - left, margin - top)
    ImageDraw.Draw(image).text(at, written, fill=tuple(int(c) for c in ink), font=font)
    image = image.rotate(
        float(rng.normal(0, 1)), Image.Resampling.BICUBIC, fillcolor=tuple(int(c) for c in paper)
    )
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 1.0))))
    width = min(WIDTH, max(1, round(image.width * HEIGHT / image.height)))
    image = image.resize((width, HEIGHT), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.float32) + rng.normal(0, rng.uniform(0, 12), (HEIGHT, width, 3))
    pixels = np.clip(np.round(pixels), 0, 255)
    out = np.zeros((3, HEIGHT, WIDTH), np.float32)
    out[:, :, :width] = (pixels.transpose(2, 0, 1) / 255 - 0.5) / 0.5
    return out


def strings(probabilities: Array) -> list[tuple[int, ...]]:
    """Characters read from [N, T, classes]: the best of each step, repetitions and blanks out."""
    best = probabilities.argmax(-1)
    fresh = np.concatenate([np.ones_like(best[:, :1], bool), best[:, 1:] != best[:, :-1]], 1)
    return [tuple(row[keep & (row != 0)].tolist()) for row, keep in zip(best, fresh, strict=True)]


def inside(string: tuple[int, ...], space: int) -> tuple[int, ...]:
    """Without the spaces at its ends."""
    kept = [i for i, character in enumerate(string) if character != space]
    return string[kept[0] : kept[-1] + 1] if kept else ()


def session(path: Path, threads: int) -> ort.InferenceSession:
    """The file with optimizations on."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(path: Path, lines: Array) -> Array:
    """The first output for every line."""
    opened = session(path, 1)
    name = opened.get_inputs()[0].name
    return np.concatenate([opened.run(None, {name: one[None]})[0] for one in lines])


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Lines one at a time, as the peer wants them."""

    def __init__(self, name: str, lines: Array) -> None:
        self.feeds = iter([{name: one[None]} for one in lines])

    def get_next(self) -> dict[str, Array] | None:
        """The next line, or None at the end."""
        return next(self.feeds, None)


def peer(model: Path, output: Path, lines: Array, **options: Any) -> None:
    """onnxruntime's recipe."""
    prepared, newer = output.with_suffix(".prepared.onnx"), output.with_suffix(".newer.onnx")
    # Scales per channel need opset 13
    onnx.save(onnx.version_converter.convert_version(onnx.load(str(model)), 17), str(newer))
    quant_pre_process(str(newer), str(prepared), skip_symbolic_shape=True)
    name = onnx.load(str(prepared), load_external_data=False).graph.input[0].name
    quantize_static(
        str(prepared),
        str(output),
        Reader(name, lines),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        **options,
    )


def sized(path: Path) -> Path:
    """The same file for one line of that size, so that its multiplications can be counted."""
    model = onnx.load(str(path))
    for axis, size in ((1, 3), (2, HEIGHT), (3, WIDTH)):  # an open batch, as in the file
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model)
    onnx.save(model, str(path.with_suffix(".sized.onnx")))
    return path.with_suffix(".sized.onnx")


def row(name: str, path: Path, lines: Array, reference: Array) -> str:
    """What a file reads, as a row without its speed."""
    found = outputs(path, lines)
    pairs = list(zip(strings(found), strings(reference), strict=True))
    same = 100 * float(np.mean([mine == theirs for mine, theirs in pairs]))
    space = reference.shape[-1] - 1
    inner = 100 * float(np.mean([inside(a, space) == inside(b, space) for a, b in pairs]))
    noise = np.square(found - reference).sum() / np.square(reference).sum()
    decibels = -10 * np.log10(max(float(noise), 1e-30))
    share = 0.0 if name == "FP32" else measure_coverage(sized(path), "onnxruntime").percent
    size = path.stat().st_size / 1e6
    texts = f"{same:.1f} % of strings, {inner:.1f} % without spaces at their ends"
    return f"{name}: {texts}, {decibels:.1f} dB, {share:.1f} % of MACs, {size:.2f} MB"


def main() -> None:
    """Print a row for each file, then speeds, each file in turn."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--lines", type=int, default=400)
    parser.add_argument("--further", type=int, default=1400)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--keep", type=Path, help="a folder for our files")
    given = parser.parse_args()
    rng, files = np.random.default_rng(0), fonts()
    drawn = np.stack([line(rng, files) for _ in range(given.lines)])
    calib, test = drawn[0::2], drawn[1::2]
    rng = np.random.default_rng(77)
    test = np.concatenate([test, *(line(rng, files)[None] for _ in range(given.further))])
    print(f"{len(files)} fonts, {len(calib)} lines to calibrate on, {len(test)} to measure")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        np.save(work / "calib.npy", calib)
        found = {"FP32": given.model}
        for name, convolutions in (("deploy", None), ("deploy --convolutions", True)):
            config = QuantizeConfig(
                images=given.images, size=(HEIGHT, WIDTH), report=False, check_preprocess=False,
                threads=given.threads, convolutions=convolutions,
            )  # fmt: skip
            output = work / name
            made = quantize(given.model, config=config, output=output, calib=work / "calib.npy")
            print(f"{name}: quantized", *made.report["notes"], sep="\n")
            coverage = made.report["coverage"]
            print(coverage["line"], *coverage["reasons"], sep="\n", flush=True)
            found[name] = output / "quantized.onnx"
            if given.keep:
                shutil.copytree(output, given.keep / name, dirs_exist_ok=True)
        if not given.no_peer:
            few = calib[: given.images]
            products = ["Conv", "MatMul", "Gemm"]
            peer(given.model, work / "all.onnx", few)
            peer(given.model, work / "products.onnx", few, op_types_to_quantize=products)
            found |= {"onnxruntime, all ops": work / "all.onnx"}
            found |= {"onnxruntime, products": work / "products.onnx"}
        reference = outputs(given.model, test)
        for name, path in found.items():
            print(row(name, path, test, reference), flush=True)
        runs: list[Callable[[], None]] = []
        for path in found.values():
            opened = session(path, given.threads)
            feed = {opened.get_inputs()[0].name: test[:1]}
            runs.append(lambda opened=opened, feed=feed: opened.run(None, feed))  # type: ignore[misc]
        times = interleave(runs, given.seconds)
        medians = [float(np.median(np.concatenate([np.array(r) for r in one]))) for one in times]
        for name, median in zip(found, medians, strict=True):
            print(f"{name}: {1e3 * median:.2f} ms, {medians[0] / median:.2f}x")


if __name__ == "__main__":
    main()
