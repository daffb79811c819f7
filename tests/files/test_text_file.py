"""Text that a user names is read whole, or refused in one line, and never without an end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from fuzz.cases import command
from fuzz.oracle import SECONDS, judge
from fuzz.seeds import vit
from PIL import Image

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import PtqError
from ptq_onnx.files import text_file
from ptq_onnx.files.text_file import read_text
from ptq_onnx.images.labels import read_labels

READERS = pytest.mark.parametrize("read", [read_labels, QuantizeConfig.load])


def test_a_mark_in_front_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa 1\n")
    assert read_text(tmp_path / "a") == "a 1\n"


@READERS
@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_device(read: Callable[[Path], object]) -> None:
    with pytest.raises(PtqError, match=r"/dev/zero'? cannot be read: it is not a regular file"):
        read(Path("/dev/zero"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("option", ["--config", "--labels", "--scales", "--preprocess", "--output"])
def test_a_pipe_is_not_waited_for(option: str, tmp_path: Path) -> None:
    """Nobody writes into it. Among the results it is somebody else's file, and stays."""
    onnx.save(vit(), tmp_path / "model.onnx")
    (tmp_path / "in").mkdir()
    Image.effect_noise((12, 8), 50).save(tmp_path / "in/a.png")
    name = "output" if option == "--output" else "pipe"
    (tmp_path / "output").mkdir()
    os.mkfifo(tmp_path / ("output/report.json" if option == "--output" else "pipe"))
    if option == "--output":
        os.mkfifo(tmp_path / "output/.ptq_onnx.json")
    words = ("quantize", "model.onnx", "--calib", "in", "--val", "in", "--threads", "1")
    more = ("--quantizer", "vanilla", "--no-report", "--no-check-preprocess")
    found = judge(lambda: command(*words, *more, option, name), tmp_path)
    assert found.finding == ""
    assert found.code == (0 if option == "--output" else 2)
    assert found.seconds < SECONDS


@READERS
def test_too_large(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_file, "LARGEST", 1 << 20)
    (tmp_path / "a").write_bytes(b"#" * ((1 << 20) + 1))
    most = "1" if read is read_labels else "0.25"
    with pytest.raises(PtqError, match=f"it has more than {most} MB"):
        read(tmp_path / "a")


@READERS
@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x00\x01"])
def test_no_text(read: Callable[[Path], object], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(PtqError):
        read(tmp_path / "a")


@pytest.mark.parametrize(
    "text",
    [
        "bits: !!int x",
        f"images: {'9' * 5000}",
        "a: " + "[" * 20_000,
        "images: !!python/object/apply:os.system ['true']",
        "images: 2026-01-01",
        "a: &a [*a]",
    ],
    ids=["int", "digits", "nested", "python", "date", "anchor"],
)
def test_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(PtqError) as raised:
        QuantizeConfig.load(tmp_path / "a.yaml")
    assert len(str(raised.value)) < 700
