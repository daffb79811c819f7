"""What may become of a case: success, or exit code 2 with exactly one line; and nothing left."""

from __future__ import annotations

import io
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ptq_onnx.cli.console import one_line_errors

SECONDS = 60
LARGEST = 2 << 30
"""Bytes of memory."""


COMM = Path("/proc/self/comm")
"""The process's name, as others see it."""
OWN = "oracle"


@contextmanager
def oracle_runs() -> Iterator[None]:
    """Name the process for as long as the oracle's own work is done in it: the memory that a
    damaged original takes in ONNX Runtime is not the package's."""
    before = COMM.read_text(encoding="utf-8")
    COMM.write_text(OWN, encoding="utf-8")
    try:
        yield
    finally:
        COMM.write_text(before, encoding="utf-8")


class Hang(BaseException):
    """The time is over."""


class Wrong(Exception):
    """What a case has found itself: wrong numbers."""


@dataclass(frozen=True)
class Outcome:
    """What a case did. ``finding`` is empty where all is well."""

    finding: str
    code: int
    text: str = ""
    seconds: float = 0.0

    @property
    def admits(self) -> bool:
        """Whether the one line says that the fault is the package's own."""
        return "a bug here" in self.text


def judge(call: Callable[[], object], folder: Path) -> Outcome:
    """Run ``call`` as the command line runs its commands, in ``folder``, and look at the rest.

    Of new files and folders only ``folder/output`` and what is in it may stay, after a success.
    """
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    before = _files(folder)
    error, code, began = "", 0, time.monotonic()
    with _captured(folder) as captured, _elsewhere(temporary), _alarm(SECONDS):
        try:
            with one_line_errors():
                call()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except Hang:
            error = "hang"
        except Wrong as wrong:
            error = f"parity: {wrong}"
        except BaseException:
            error = f"traceback: {traceback.format_exc()}"
    seconds = time.monotonic() - began
    stderr = captured[0]
    left = sorted(_files(folder) - before)
    if code == 0 and not error:
        left = [name for name in left if not f"{name}/".startswith("output/") or "/." in name]
        left = [name for name in left if name != "output/.ptq_onnx.json"]
    return Outcome(_finding(error, code, stderr, left), code, stderr, seconds)


def _finding(error: str, code: int, stderr: str, left: list[str]) -> str:
    lines = stderr.splitlines()
    if error:
        return error
    if code == 0 and lines:
        return f"lines: success with {stderr[:500]!r}"
    if code not in (0, 2):
        return f"code: {code} with {stderr[:500]!r}"
    if code == 2 and (len(lines) != 1 or not lines[0].startswith("error: ")):
        return f"lines: {stderr[:1000]!r}"
    if left:
        return f"left: {', '.join(left[:5])}"
    return ""


def _files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


@contextmanager
def _captured(folder: Path) -> Iterator[list[str]]:
    """What Python and what libraries in C write: the descriptors themselves go to files."""
    captured: list[str] = []
    streams, saved = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        for stream in streams:
            stream.flush()
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", write_through=True)
        try:
            yield captured
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            sys.stdout, sys.stderr = streams
            for number, kept in enumerate(saved, start=1):
                os.dup2(kept, number)
                os.close(kept)
            err.seek(0)
            captured.append(err.read().decode("utf-8", "replace"))


@contextmanager
def _elsewhere(temporary: Path) -> Iterator[None]:
    """Temporary files where they are seen, and the working folder with the case."""
    before, here = tempfile.tempdir, Path.cwd()
    tempfile.tempdir = str(temporary)
    os.chdir(temporary.parent)
    try:
        yield
    finally:
        tempfile.tempdir = before
        os.chdir(here)


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def over(_: int, __: FrameType | None) -> None:
        raise Hang

    handlers = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handlers[1])
        signal.signal(signal.SIGTERM, handlers[0])
