"""A folder of images is untrusted: what decodes a file, and what is a file at all."""

from __future__ import annotations

import os
import socket
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features

from ptq_onnx.errors import ImageError
from ptq_onnx.images.opening import EXTENSIONS, Preprocess, load_image, open_images
from ptq_onnx.images.preprocess import _convert, open_picture

AT_32 = Preprocess.named("inception", 32)
PICTURE = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append("gs"))
    (tmp_path / "a.png").write_bytes(EPS)
    with pytest.raises(ImageError, match=r"a\.png' cannot be read: cannot identify"):
        load_image(tmp_path / "a.png", AT_32)
    with pytest.raises(ImageError, match=r"a\.png' cannot be read: cannot identify"):
        open_picture(tmp_path / "a.png")  # for a function of the user's
    assert started == []


@pytest.mark.parametrize("kind", ["dds", "pcx", "tga", "icns", "sgi", "blp", "ico"])
def test_other_formats_are_not_decoded(tmp_path: Path, kind: str) -> None:
    picture = PICTURE.convert("P") if kind == "blp" else PICTURE
    picture.save(tmp_path / "made", kind.upper())
    (tmp_path / "made").rename(tmp_path / "a.png")
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(tmp_path / "a.png", AT_32)


@pytest.mark.parametrize("suffix", sorted(EXTENSIONS))
def test_every_suffix_has_its_decoder(tmp_path: Path, suffix: str) -> None:
    mode = "L" if suffix == ".pgm" else "RGB"
    PICTURE.convert(mode).save(tmp_path / f"a{suffix}")
    source = open_images(tmp_path, AT_32)
    assert (source.names, next(source.batches(1)).shape) == ([f"a{suffix}"], (1, 3, 32, 32))


@pytest.mark.parametrize("name", ["webp", "avif"])
def test_formats_that_may_not_be_built_in(name: str) -> None:
    assert (f".{name}" in EXTENSIONS) == features.check(name)


def test_of_an_animation_the_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("L", (32, 32), level) for level in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    flat = load_image(tmp_path / "a.gif", AT_32)
    assert np.allclose(flat, (10 / 255 - 0.5) / 0.5)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_or_socket_is_no_image(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "d.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "c.png"))
        assert open_images(tmp_path, AT_32).names == ["a.png"]
    for name in ("b.png", "c.png", "d.png"):
        with pytest.raises(ImageError, match="not a regular file"):
            load_image(tmp_path / name, AT_32)


def test_too_many_pixels_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    PICTURE.save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"1024 pixels.*exceeds limit"):
        load_image(tmp_path / "a.png", AT_32)


@pytest.mark.parametrize("kind", ["<u2", ">u2", "<i4"])
def test_a_deep_gray_picture_takes_few_times_its_size(kind: str) -> None:
    """16 bits and 32, either order: the upper byte; no copy in a wider type."""
    values = (np.arange(1 << 20).reshape(1024, 1024) % 65536).astype(kind)
    image = Image.fromarray(values)
    tracemalloc.start()
    found = np.asarray(_convert(image, 1))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, (values >> 8).clip(0, 255))
    assert most <= 4 * values.nbytes
