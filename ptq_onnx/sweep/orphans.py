"""The processes that Ray starts end with the sweep, however that ends.

They all inherit a variable of their environment, by which they are found, or, as some write over
it, by the files that they hold open (Linux; elsewhere Ray's own means have to do).
``python -m ptq_onnx.sweep.orphans MARK FOLDER`` waits until its input ends, which
it does when the sweep's process is gone, even killed, and then ends what is left.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

VARIABLE = "PTQ_ONNX_SWEEP"
ROUNDS, PAUSE = 400, 0.05
QUIET, LONG_QUIET = 4, 40
"""Looks in a row that find nothing, until there is nothing: a process that is just being started
does not show its mark yet. More of them where the sweep was killed, at whatever it was."""


@contextmanager
def watched(folder: Path) -> Iterator[str]:
    """Processes started inside carry a mark, which it returns, and are gone afterwards, as are all
    that hold a file in ``folder``."""
    mark = secrets.token_hex(8)
    watcher = subprocess.Popen(
        [sys.executable, "-m", __name__, mark, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in a terminal is not for it
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    os.environ[VARIABLE] = mark
    try:
        yield mark
    finally:
        os.environ.pop(VARIABLE, None)
        end_marked(mark, folder)
        watcher.terminate()
        watcher.wait()


def end_marked(mark: str, folder: Path, quiet: int = QUIET) -> None:
    """Kill all processes with the mark, or files in the folder, but this one, until ``quiet`` looks
    in a row find none."""
    nothing = 0
    for _ in range(ROUNDS):
        found = [pid for pid in marked(mark, folder) if pid != os.getpid()]
        nothing = 0 if found else nothing + 1
        if nothing == quiet:
            return
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE)


def marked(mark: str, folder: Path | None = None) -> list[int]:
    """The processes that started with the mark in their environment, or hold files in ``folder``;
    those that are dead and only not yet waited for do not count."""
    wanted, found = f"{VARIABLE}={mark}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or another user's
            environment = (process / "environ").read_bytes().split(b"\0")
            if wanted in environment or (folder is not None and _holds(process, folder)):
                found.append(int(process.name))
    return found


def _holds(process: Path, folder: Path) -> bool:
    """Whether a process has a file open in the folder, there or removed."""
    for link in (process / "fd").iterdir():
        with suppress(OSError):  # closed
            if os.readlink(link).startswith(f"{folder}{os.sep}"):
                return True
    return False


def named(mark: str, word: str) -> set[int]:
    """Those of the marked processes whose command line has a word in it."""
    found = set()
    for pid in marked(mark):
        with suppress(OSError):
            if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


def main(mark: str, folder: str) -> None:
    """Wait for the end of the input, then end what is marked."""
    while sys.stdin.buffer.read(1 << 10):
        pass
    end_marked(mark, Path(folder), LONG_QUIET)


if __name__ == "__main__":
    main(*sys.argv[1:3])
