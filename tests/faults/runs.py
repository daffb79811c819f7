"""Runs of the command line in processes of their own, to be stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from fuzz.seeds import vit

from ptq_onnx.files.publishing import MANIFEST

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120


def model_in(folder: Path) -> Path:
    """A small model in a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(vit(), folder / "model.onnx")
    return folder


def words(quantizer: str = "vanilla", *more: str) -> tuple[str, ...]:
    return (
        *("quantize", "model.onnx", "--calib", "noise", "--images", "8", "--threads", "1"),
        *("--quantizer", quantizer, *more),
    )


def start(folder: Path, *given: str) -> subprocess.Popen[str]:
    """A command in ``folder``; its temporary files lie in there too."""
    (folder / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "ptq_onnx", *given],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_work(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until the hidden folder of the results is there, or the process is gone."""
    end = time.monotonic() + SECONDS
    known = {p.name for p in folder.glob(".*")}
    while process.poll() is None and time.monotonic() < end:
        if {p.name for p in folder.glob(".*")} - known:
            return
        time.sleep(0.005)


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob(".*"))


def content(folder: Path) -> dict[str, bytes]:
    """Bytes by name, without what differs from run to run."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files if p.name != MANIFEST}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes; Python ignores the signal that comes with it."""
    import resource  # POSIX has it

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
