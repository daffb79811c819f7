"""Damaged pictures and arrays."""

from __future__ import annotations

import io
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fuzz.bytes_of import damaged
from ptq_onnx.images.opening import open_images
from ptq_onnx.images.preprocess import Preprocess

Call = Callable[[], object]
SHAPE = (3, 8, 12)
PREPROCESS = Preprocess.named("imagenet", (8, 12))
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM", "WEBP")
ENDS = (".png", ".jpg", ".bmp", ".gif", ".tif", ".ppm", ".pgm", ".webp")
MODES = ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "I", "F", "LA")
NAMES = ("a", "a" * 245, "é×", "\x1b[31m", "\u202e", "a\nb", "..", "-x", " ")


def image_case(rng: random.Random, folder: Path) -> Call:
    """A damaged picture beside a good one, or alone."""
    (folder / "in").mkdir()
    name = rng.choice(NAMES) + rng.choice(ENDS)
    (folder / "in" / name).write_bytes(damaged(_picture(rng), rng))
    if rng.random() < 0.7:
        Image.new("RGB", (20, 20), "red").save(folder / "in/good.png")
    return lambda: _read(folder / "in", 2)


def _picture(rng: random.Random) -> bytes:
    size = rng.choice(((12, 8), (1, 1), (1, 300), (13, 9), (40, 30), (300, 1)))
    image = Image.effect_noise(size, 50).convert("RGB")
    buffer = io.BytesIO()
    try:
        image = image.convert(rng.choice(MODES))
        image.save(buffer, rng.choice(FORMATS))
    except (OSError, ValueError):  # not every format has every mode
        Image.effect_noise(size, 50).save(buffer, "PNG")
    return buffer.getvalue()


def npy_case(rng: random.Random, folder: Path) -> Call:
    path = folder / f"a.{'npz' if rng.random() < 0.1 else 'npy'}"
    path.write_bytes(npy_bytes(rng))
    return lambda: _read(path, rng.choice((None, 2)))


def npy_bytes(rng: random.Random) -> bytes:
    """An array file, its bytes damaged or its header forged."""
    buffer = io.BytesIO()
    np.save(buffer, _array(rng))
    content = buffer.getvalue()
    if rng.random() < 0.5:
        return damaged(content, rng)
    if rng.random() < 0.5:
        return content
    end = content.index(b"\n") + 1
    # fmt: off
    shapes = ("(-1, 3, 8, 12)", "(10**12, 3, 8, 12)", "(4, 3, 8, 12.0)", "()", "(True, 3, 8, 12)",
              f"({1 << 62}, 3, 8, 12)", "(0, 3, 8, 12)", "(4, 3, 8)", "(((((4,),),),),)")
    # fmt: on
    kinds = ("<f4", "|O", "|u1", "<f8", ">f4", "<M8[s]", "|V10", "<U3", "<c8", "|b1", "x", "<f2")
    header = (
        f"{{'descr': '{rng.choice(kinds)}', 'fortran_order': {rng.random() < 0.3}, "
        f"'shape': {rng.choice(shapes)}, }}"
    ).encode()
    header += b" " * (64 - (11 + len(header)) % 64) + b"\n"
    return content[:8] + len(header).to_bytes(2, "little") + header + content[end:]


def _array(rng: random.Random) -> NDArray[Any]:
    count = rng.choice((1, 4, 5))
    if rng.random() < 0.4:
        channels = rng.choice((1, 2, 3, 4))
        return np.full((count, rng.choice((8, 20)), 16, channels), 7, np.uint8)
    array: NDArray[Any] = np.ones((count, *SHAPE), rng.choice((np.float32, np.float64, np.float16)))
    if rng.random() < 0.2:
        array.flat[3] = rng.choice((np.nan, np.inf, -np.inf))
    return np.asfortranarray(array) if rng.random() < 0.2 else array


def npz_case(rng: random.Random, folder: Path) -> Call:
    """An archive with damage inside, or in the archive itself."""
    buffer = io.BytesIO()
    packing = rng.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    names = rng.choice((("images.npy",), ("x.npy", "y.npy"), ("a",), ("a.npy", "b.npy"), ()))
    with zipfile.ZipFile(buffer, "w", packing) as archive, warnings.catch_warnings():
        for name in names:
            archive.writestr(name, npy_bytes(rng))
    content = bytearray(buffer.getvalue())
    for mark, at in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        if rng.random() < 0.1 and mark in content:
            content[content.index(mark) + at] |= 1  # encrypted
    whole = bytes(content)
    path = folder / f"a.{'npy' if rng.random() < 0.1 else 'npz'}"
    path.write_bytes(damaged(whole, rng, 3) if rng.random() < 0.5 else whole)
    return lambda: _read(path, rng.choice((None, 2)))


def _read(source: Path, limit: int | None) -> None:
    images = open_images(source, PREPROCESS, limit)
    for _ in range(2):
        for batch in images.batches(4):
            assert batch.shape[1:] == SHAPE
            assert np.isfinite(batch).all()
