"""A sweep whose processes are killed: a worker, Ray itself, the sweep; the next run goes on.

``benchmarks/sweep_kills.py`` does so many times, at random, with real quantizations.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from sweep.stub import RESULT, cells, content

pytest.importorskip("ray", reason="a sweep runs on Ray: the extra [ray]")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found by /proc")

TESTS = Path(__file__).resolve().parents[1]
CELLS, LONGEST = 16, 60
PROMPT = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "200",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "2",
}
"""Ray sees within a second or two that a node is gone."""


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}
"""127.0.0.1, and the same as an address of IPv6."""


def interruptible() -> None:
    """As in the foreground: a shell starts what is in its background deaf to interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Run:
    """The stub as a process, whose children are found by a variable of their environment."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.mark = folder, secrets.token_hex(8)
        path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sweep.stub", str(folder), str(CELLS), "2", str(seconds)],
            env={**os.environ, **PROMPT, "PYTHONPATH": path, "STUB_RUN": self.mark},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=interruptible,
        )

    def all(self) -> dict[int, str]:
        """The command lines of its processes, by their number."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                mine = f"STUB_RUN={self.mark}".encode() in (place / "environ").read_bytes()
                if mine or os.readlink(place / "cwd") == str(self.folder):
                    found[int(place.name)] = (place / "cmdline").read_text()
            except OSError:  # gone
                pass
        return found

    def gone(self) -> bool:
        """Whether all of them end within seconds."""
        end = time.monotonic() + 10
        while self.all() and time.monotonic() < end:
            time.sleep(0.05)
        return not self.all()

    def told(self) -> tuple[int, str, str]:
        out, errors = self.process.communicate(timeout=LONGEST)
        return self.process.returncode, out, errors


def reached(pids: Iterable[int]) -> set[str]:
    """The addresses, as the kernel writes them, on which processes listen or are connected."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):  # closed
                inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for kind in ("tcp", "tcp6", "udp", "udp6")
            for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]  # fmt: skip
    return {row[1].partition(":")[0] for row in rows if row[9] in inodes}


def done(folder: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in folder.glob(f"m/[!.]*/{RESULT}")}


def wait_for(folder: Path, count: int) -> None:
    end = time.monotonic() + LONGEST
    while len(done(folder)) < count and time.monotonic() < end:
        time.sleep(0.02)


def test_killed_and_taken_up_again(tmp_path: Path) -> None:
    """A worker first, whose cell is tried again, then Ray; then the sweep; then it ends."""
    whole = {cell.name.partition("/")[2]: content(cell) for cell in cells(CELLS)}
    (tmp_path / "die").touch()
    first = Run(tmp_path, 0.4)
    wait_for(tmp_path, 2)
    for pid, command in first.all().items():
        if "raylet/raylet" in command:
            os.kill(pid, signal.SIGKILL)
    code, out, errors = first.told()
    assert (code, out) == (2, "")
    assert "Ray ended with" in errors
    assert "the same command goes on" in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "die").exists()  # a worker was killed by it
    assert first.gone()
    before = len(done(tmp_path))
    assert 2 <= before < CELLS
    assert list(tmp_path.glob("m/.*")) == []

    second = Run(tmp_path, 0.4)
    wait_for(tmp_path, before + 1)
    second.process.kill()
    second.told()
    assert second.gone()
    assert before < len(done(tmp_path)) < CELLS

    third = Run(tmp_path, 0.0)
    code, out, errors = third.told()
    assert (code, errors) == (0, "")
    assert int(out.split()[0]) > before
    assert done(tmp_path) == whole
    assert third.gone()
    left = [p.name for p in tmp_path.rglob(".*") if p.name != ".ptq_onnx.json"]
    assert left == []


def test_nobody_else_is_talked_to_and_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, 30.0)
    end = time.monotonic() + LONGEST
    while not list(tmp_path.glob("m/.*")) and time.monotonic() < end:
        time.sleep(0.02)
    found = reached(run.all())
    assert found
    assert found - LOOPBACK == set()
    run.process.send_signal(signal.SIGINT)
    assert run.told() == (130, "", "")
    assert run.gone()
    assert list(tmp_path.iterdir()) == []
