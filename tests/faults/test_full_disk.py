"""A disk that is full at some moment: one line, exit code 2, and the old results as they were.

The limit is that of the size of a file, which ends a write as a full disk does, with another word.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from fuzz.cases import command
from fuzz.oracle import judge
from PIL import Image

from faults.runs import content, limited, model_in, words

pytest.importorskip("resource", reason="limits are POSIX's")
pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="the limit ends the process there")
FEW = ("--analysis-images", "2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = model_in(tmp_path_factory.mktemp("full"))
    assert judge(lambda: command(*words("vanilla", *FEW)), folder).finding == ""
    return folder


@pytest.mark.parametrize("size", [600, 4_000, 12_000, 40_000, 90_000])
def test_quantize(made: Path, size: int) -> None:
    old = content(made / "output")
    found = judge(limited(size, lambda: command(*words("channelwise", *FEW))), made)
    assert found.finding == ""
    assert found.code == 2
    assert "File too large" in found.text
    assert content(made / "output") == old


def test_it_was_large_enough(made: Path) -> None:
    largest = max(map(len, content(made / "output").values()))
    assert largest > 90_000


def test_kept_images(tmp_path: Path) -> None:
    from ptq_onnx.images.opening import open_images
    from ptq_onnx.images.preprocess import Preprocess

    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((50, 3, 8, 8), np.float32))
    preprocess = Preprocess.named("imagenet", 8)
    found = judge(limited(9_000, lambda: open_images(tmp_path / "a.npz", preprocess)), tmp_path)
    assert found.finding == ""
    assert "set TMPDIR" in found.text


CURVE = ("calibration-curve", "model.onnx", "--calib", "in", "--val", "in", "--sizes", "1",
         "--quantizer", "vanilla", "--threads", "1")  # fmt: skip
ANALYSE = ("analyse", *words("vanilla", *FEW, "--no-sensitivity")[1:])
COMPARE = ("compare", "output", "--val", "in", "--threads", "1")
BENCHMARK = ("benchmark", "model.onnx", "--seconds", "0.01", "--batch", "1", "--threads", "1")


@pytest.mark.parametrize(
    ("size", "given"),
    [(600, (*CURVE, "-o", "other")), (20_000, (*CURVE, "-o", "other")),
     (600, (*ANALYSE, "-o", "o")),
     (12_000, (*ANALYSE, "-o", "o")), (90_000, (*ANALYSE, "-o", "o")), (600, (*COMPARE, "-o", "o")),
     (100, (*BENCHMARK, "-o", "times.json"))],
    ids=["curve, models", "curve, picture", "analyse, first", "analyse, pictures", "analyse, page",
         "compare", "benchmark"],
)  # fmt: skip
def test_other_commands(made: Path, size: int, given: tuple[str, ...]) -> None:
    """The picture of a curve, the attention maps and the page are too large in turn."""
    if not (made / "in").exists():
        (made / "in").mkdir()
        for index in range(2):
            Image.new("RGB", (12, 8), (90 * index, 5, 5)).save(made / f"in/{index}.png")
    old = content(made)
    found = judge(limited(size, lambda: command(*given)), made)
    assert found.finding == ""
    assert found.code == 2
    assert "File too large" in found.text
    assert content(made) == old
