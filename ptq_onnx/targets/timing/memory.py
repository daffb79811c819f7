"""Peak memory of one model, in a process of its own.

``python -m ptq_onnx.targets.timing.memory RUNTIME BATCH THREADS PRECISION`` takes a pickled
:class:`Subject` from its input and prints bytes.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from ptq_onnx.errors import PtqError
from ptq_onnx.targets.timing.runtimes import open_runtime
from ptq_onnx.targets.timing.timed_model import Subject

RUNS = 2
PROCESS = Path("/proc/self")


def peak_memory(
    runtime: str, subject: Subject, batch: int, threads: int, precision: str
) -> int | None:
    """Bytes that opening and running a model adds at most to a process with the runtime loaded.

    None where nothing tells them, or the process fails.
    """
    command = [sys.executable, "-m", __name__, runtime, str(batch), str(threads), precision]
    done = subprocess.run(command, input=pickle.dumps(subject), capture_output=True)
    words = done.stdout.decode(errors="replace").split()
    return int(words[-1]) if done.returncode == 0 and words and words[-1].isdigit() else None


def held() -> int | None:
    """Bytes this process holds now; forgets what it held before."""
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int | None:
    """Bytes this process has held at most, since :func:`held` where the system can forget.

    Linux's own count: getrusage's would include what the parent held when it forked.
    """
    return _status("VmHWM")


def _status(key: str) -> int | None:
    try:
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{key}:")), None)


def main(words: list[str], data: bytes) -> int:
    """Open the model, run it, print what that added."""
    name, batch, threads, precision = words
    subject: Subject = pickle.loads(data)  # written by the parent process
    try:
        runtime = open_runtime(name)
        before = held()
        runner = runtime.open(subject, int(batch), threads=int(threads), precision=precision)
        if runner is not None:
            for _ in range(RUNS):
                runner.run()
    except PtqError as error:
        print(error, file=sys.stderr)
        return 2
    after = peak()
    print("unknown" if before is None or after is None else max(0, after - before))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin.buffer.read()))
