"""A disk that is full at some moment: one line, exit code 2, and the old results as they were.

The limit is that of the size of a file, which ends a write as a full disk does, with another word.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fuzz.cases import command
from fuzz.oracle import judge

from faults.runs import content, model_in, words

resource = pytest.importorskip("resource", reason="limits are POSIX's")
pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="the limit ends the process there")
FEW = ("--analysis-images", "2")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes; Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def limited(size: int, call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with files_of_at_most(size):
            call()

    return run


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


@pytest.mark.parametrize("words_of", [("compare", "output", "output", "--output", "page.html")])
def test_other_commands(made: Path, words_of: tuple[str, ...]) -> None:
    found = judge(limited(600, lambda: command(*words_of)), made)
    assert found.finding == ""
    assert found.code == 2
