"""Array files that claim more than they hold, or hold more than they should."""

from __future__ import annotations

import io
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ptq_onnx.errors import ImageError
from ptq_onnx.images import array_files
from ptq_onnx.images import arrays as image_arrays
from ptq_onnx.images.opening import open_images
from ptq_onnx.images.preprocess import Preprocess

PLAIN = Preprocess((0.0,) * 3, (1.0,) * 3, (8, 8))
FLOATS = np.random.default_rng(0).normal(size=(7, 3, 8, 8)).astype(np.float32)


def header(shape: str, descr: str = "'<f4'", fortran: bool = False) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"


def archive(path: Path, *members: tuple[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", packing) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ImageError) as raised:
        list(open_images(path, PLAIN).batches(4))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("shape", "descr", "reason"),
    [
        ("(-1, 3, 8, 8)", "'<f4'", "claims the shape [-1, 3, 8, 8]"),
        (f"({1 << 40}, 3, 8, 8)", "'<f4'", "claims the shape"),
        ("(1000, 3, 8, 8)", "'<f4'", "cut short"),
        ("(7, 3, 8, 8)", "'|O'", "Python objects"),
        ("(7, 3, 8, 8)", "'nothing'", "descr"),
        ("(7, 3, 8, 8)", "'<i4'", "expected floats or uint8"),
        ("(7, 3, 8.0, 8)", "'<f4'", "shape"),
        ("(", "'<f4'", "header"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_forged_headers(tmp_path: Path, shape: str, descr: str, reason: str, packed: bool) -> None:
    content = header(shape, descr) + FLOATS.tobytes()
    path = tmp_path / ("a.npz" if packed else "a.npy")
    if packed:
        archive(path, ("images.npy", content))
    else:
        path.write_bytes(content)
    assert reason in refusal(path)


def test_a_bomb_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 MB of zeros in 8 KB, of which 1 MB may be kept: two images are, all are read again."""
    monkeypatch.setattr(array_files, "KEPT", 1 << 20)
    monkeypatch.setattr(image_arrays, "KEPT", 1 << 20)
    shape = (10_000, 3, 8, 8)
    path = tmp_path / "a.npz"
    archive(path, ("images.npy", header(str(shape), "'<f4'") + bytes(4 * 192 * 10_000)))
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(array_files.tempfile, "tempdir", str(tmp_path))
    few = open_images(path, PLAIN, limit=2)
    assert few.names == ["0", "5000"]
    assert [len(batch) for batch in few.batches(8)] == [2]
    whole = open_images(path, PLAIN)
    assert isinstance(whole, image_arrays.StreamedSource)
    for _ in range(2):
        assert sum(len(batch) for batch in whole.batches(512)) == 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_memory_stays(tmp_path: Path) -> None:
    """600 MB unpacked, some MB held."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("images.npy", "w", force_zip64=True) as member,
    ):
        member.write(header("(3125, 250, 256, 3)", "'|u1'"))
        for _ in range(3125):
            member.write(bytes(250 * 256 * 3))
    path = tmp_path / "a.npz"
    path.write_bytes(buffer.getvalue())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = open_images(path, PLAIN)
    assert len(source) == 3125
    next(source.batches(4))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_what_is_kept_is_what_is_read(tmp_path: Path) -> None:
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        buffer = io.BytesIO()
        np.save(buffer, FLOATS)
        path = archive(tmp_path / f"{packing}.npz", ("x.npy", buffer.getvalue()), packing=packing)
        source = open_images(path, PLAIN, limit=3)
        np.testing.assert_array_equal(np.concatenate(list(source.batches(2))), FLOATS[[0, 2, 4]])


def test_renamed_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", FLOATS)
    (tmp_path / "a.npy").rename(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", images=FLOATS)
    (tmp_path / "c.npz").rename(tmp_path / "d.npy")
    for name in ("b.npz", "d.npy"):
        source = open_images(tmp_path / name, PLAIN)
        np.testing.assert_array_equal(np.concatenate(list(source.batches(7))), FLOATS)


def test_fortran_order(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.asfortranarray(FLOATS))
    source = open_images(tmp_path / "a.npy", PLAIN)
    np.testing.assert_array_equal(np.concatenate(list(source.batches(7))), FLOATS)
    np.savez(tmp_path / "a.npz", images=np.asfortranarray(FLOATS))
    assert "np.ascontiguousarray" in refusal(tmp_path / "a.npz")


def test_damaged_archives(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", images=FLOATS)
    content = bytearray((tmp_path / "good.npz").read_bytes())
    changed = bytearray(content)
    changed[2000] ^= 1
    locked = bytearray(content)
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    locked[6] |= 1
    for name, data, reason in (
        ("changed", changed, "CRC"),
        ("cut", content[:3000], "zip"),
        ("locked", locked, "encrypted"),
        ("empty", b"", "zip"),
    ):
        (tmp_path / f"{name}.npz").write_bytes(bytes(data))
        assert reason in refusal(tmp_path / f"{name}.npz")
    other = archive(tmp_path / "other.npz", ("images", b"nothing"))
    assert "cannot be read" in refusal(other)
    more = archive(tmp_path / "more.npz", ("x.npy", header("(1, 3, 8, 8)") + FLOATS.tobytes()))
    assert "holds more than its array" in refusal(more)


def test_no_regular_file(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.npz")
    assert "not a regular file" in refusal(tmp_path / "a.npz")


def test_a_picture_too_narrow(tmp_path: Path) -> None:
    """One by 60,000 pixels, which as wide as the input would be as long as 480,000."""
    np.save(tmp_path / "a.npy", np.zeros((1, 1, 60_000, 3), np.uint8))
    wide = Preprocess((0.0,) * 3, (1.0,) * 3, (224, 224))
    with pytest.raises(ImageError, match="too narrow"):
        list(open_images(tmp_path / "a.npy", wide).batches(1))
