"""The processes that Ray starts end with the sweep, however that ends.

They all inherit a variable of their environment, by which they are found (Linux; elsewhere Ray's
own means have to do). ``python -m ptq_onnx.sweep.orphans MARK`` waits until its input ends, which
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
def watched() -> Iterator[str]:
    """Processes started inside carry a mark, which it returns, and are gone afterwards."""
    mark = secrets.token_hex(8)
    watcher = subprocess.Popen(
        [sys.executable, "-m", __name__, mark],
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
        end_marked(mark)
        watcher.terminate()
        watcher.wait()


def end_marked(mark: str, quiet: int = QUIET) -> None:
    """Kill all processes with the mark but this one, until ``quiet`` looks in a row find none."""
    nothing = 0
    for _ in range(ROUNDS):
        found = [pid for pid in marked(mark) if pid != os.getpid()]
        nothing = 0 if found else nothing + 1
        if nothing == quiet:
            return
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE)


def marked(mark: str) -> list[int]:
    """The processes that started with the mark in their environment; those that are dead and only
    not yet waited for do not count."""
    wanted, found = f"{VARIABLE}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def named(mark: str, word: str) -> set[int]:
    """Those of the marked processes whose command line has a word in it."""
    found = set()
    for pid in marked(mark):
        with suppress(OSError):
            if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


def main(mark: str) -> None:
    """Wait for the end of the input, then end what is marked."""
    while sys.stdin.buffer.read(1 << 10):
        pass
    end_marked(mark, LONG_QUIET)


if __name__ == "__main__":
    main(sys.argv[1])
