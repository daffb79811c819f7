"""A run that is killed, terminated or interrupted while it writes, over an old result."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults.runs import SECONDS, content, hidden, model_in, start, wait_for_work, words

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
CODES = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}
STOPS = [("SIGKILL", 0), ("SIGKILL", 1), ("SIGTERM", 2), ("SIGINT", 3)]
LONGEST = 0.4
"""Seconds in which the signal comes at random, from the first hidden file on."""


def whole_run(folder: Path, quantizer: str) -> dict[str, bytes]:
    process = start(folder, *words(quantizer, "--no-report"))
    _, text = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, text
    return content(folder / "output")


@pytest.fixture(scope="module")
def old_and_new(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder with the results of one quantizer, and what another one writes there."""
    folder = model_in(tmp_path_factory.mktemp("stopped"))
    new = whole_run(folder, "channelwise")
    shutil.rmtree(folder / "output")
    whole_run(folder, "vanilla")
    return folder, new


@pytest.mark.parametrize(("name", "seed"), STOPS)
def test_old_or_new(
    old_and_new: tuple[Path, dict[str, bytes]], tmp_path: Path, name: str, seed: int
) -> None:
    source, new = old_and_new
    folder = tmp_path / "case"
    shutil.copytree(source, folder)
    old = content(folder / "output")
    process = start(folder, *words("channelwise", "--no-report"))
    wait_for_work(folder, process)
    time.sleep(random.Random(seed).uniform(0, LONGEST))
    process.send_signal(getattr(signal, name))
    _, text = process.communicate(timeout=SECONDS)
    assert process.returncode in (0, CODES[name])
    assert text == ""
    assert content(folder / "output") in (old, new)
    if name == "SIGKILL":
        assert whole_run(folder, "channelwise") == new
    assert hidden(folder) == []
    assert list((folder / "tmp").iterdir()) == []


def test_two_runs_into_one_folder(
    old_and_new: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    source, new = old_and_new
    folder = model_in(tmp_path / "case")
    both: list[subprocess.Popen[str]] = [
        start(folder, *words(name, "--no-report")) for name in ("vanilla", "channelwise")
    ]
    texts = [process.communicate(timeout=SECONDS)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert texts == ["", ""]
    assert content(folder / "output") in (content(source / "output"), new)
    assert hidden(folder) == []
