"""Processes with the mark of a sweep end with it, also where it is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptq_onnx.sweep.orphans import VARIABLE, marked, watched

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
ROOT = Path(__file__).resolve().parents[2]


def wait_until_gone(mark: str) -> bool:
    end = time.monotonic() + 10
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.02)
    return not marked(mark)


def test_children_end_with_the_block(tmp_path: Path) -> None:
    with watched(tmp_path) as mark:
        child = subprocess.Popen(SLEEP, start_new_session=True)
        while child.pid not in marked(mark):
            time.sleep(0.01)
    assert child.wait(timeout=10) == -9
    assert VARIABLE not in os.environ
    assert marked(mark) == []


def test_children_end_when_the_process_is_killed(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; from pathlib import Path\n"
        "from ptq_onnx.sweep.orphans import watched\n"
        f"with watched(Path({str(tmp_path)!r})) as mark:\n"
        f"    subprocess.Popen({SLEEP!r}, start_new_session=True)\n"
        "    print(mark, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        mark = process.stdout.readline().strip()
        while not marked(mark):
            time.sleep(0.01)
        process.kill()
    assert wait_until_gone(mark)


def test_who_hides_the_mark_is_found_by_its_files(tmp_path: Path) -> None:
    """Ray's agents write their titles over their environment."""
    with watched(tmp_path) as mark, open(tmp_path / "log", "w") as log:
        bare = {"PATH": os.environ["PATH"]}
        child = subprocess.Popen(SLEEP, env=bare, stdout=log)
        assert child.pid not in marked(mark)
        assert child.pid in marked(mark, tmp_path)
    assert child.wait(timeout=10) == -9


def test_others_stay(tmp_path: Path) -> None:
    with subprocess.Popen(SLEEP) as other, watched(tmp_path) as mark:
        assert other.pid not in marked(mark)
        assert other.poll() is None
        other.kill()
