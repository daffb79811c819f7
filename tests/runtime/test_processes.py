"""Several processes give what one gives, in order, and none stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import refuses, squares

from ptq_onnx.errors import ConfigError, ModelError, PtqError
from ptq_onnx.runtime.processes import Processes, kept_processes, shared_threads

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def three() -> Iterator[Processes]:
    with Processes(3, squares, 1) as found:
        yield found


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 10])
def test_in_the_order_of_the_items(three: Processes, count: int) -> None:
    found = list(three.map(iter(range(count))))
    assert [value for value, _ in found] == [1 + i * i for i in range(count)]
    assert len({pid for _, pid in found}) == min(count, 3)
    assert os.getpid() not in {pid for _, pid in found}


def test_one_item_each_is_under_way(three: Processes) -> None:
    asked = 0

    def items() -> Iterator[int]:
        nonlocal asked
        for item in range(10):
            asked += 1
            yield item

    results = three.map(items())
    next(results)
    assert asked == 4
    assert len(list(results)) == 9


def test_errors_come_where_their_item_is() -> None:
    with Processes(2, squares, 0) as two:
        results = two.map([1, 2, 13, 3])
        assert [next(results)[0], next(results)[0]] == [1, 4]
        with pytest.raises(ModelError, match=r"^13 is refused\.$"):
            next(results)
    with (
        Processes(2, squares, 0) as two,
        pytest.raises(RuntimeError, match="ZeroDivisionError: no"),
    ):
        list(two.map([14]))
    with Processes(2, squares, 0) as two, pytest.raises(PtqError, match=r"exit code 7.*--workers"):
        list(two.map([1, 15, 2, 3]))
    with (
        Processes(1, refuses, "x") as one,
        pytest.raises(ModelError, match="x cannot be opened"),
    ):
        list(one.map([1]))
    with pytest.raises(ConfigError, match="--workers must be at least 1, got 0"):
        Processes(0, squares, 0)


def test_kept_ones_are_the_next_ones() -> None:
    """Two at a time are others; one that owes a result, or has ended, is not kept."""

    def pids(processes: Processes) -> set[int]:
        return {pid for _, pid in processes.map(range(8))}

    with kept_processes():
        with Processes(2, squares, 1) as two:
            first = pids(two)
        with Processes(2, squares, 5) as two, Processes(1, squares, 7) as beside:
            assert [value for value, _ in two.map([2, 3])] == [9, 14]
            assert pids(two) == first
            other = pids(beside)
        assert not other & first
        with kept_processes(), Processes(3, squares, 1) as three:
            assert pids(three) == first | other
            assert next(three.map([1, 2, 3, 4, 5]))[0] == 2  # two are owed
        with Processes(3, squares, 1) as three:
            assert len(pids(three) & (first | other)) == 1
            with pytest.raises(PtqError, match="exit code 7"):
                list(three.map([15, 15, 15]))
        with Processes(1, refuses, "x") as one, pytest.raises(ModelError, match="cannot be opened"):
            list(one.map([1]))
        with Processes(1, squares, 2) as one:
            last = pids(one)
    assert not any(alive(pid) for pid in first | other | last)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_they_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Idle ones at once: no one writes to their pipe any more."""
    code = (
        "import sys, time; from jobs import squares\n"
        "from ptq_onnx.runtime.processes import Processes\n"
        "if __name__ == '__main__':\n"
        "    with Processes(2, squares, 0) as two:\n"
        "        print(*{pid for _, pid in two.map(range(4))}, flush=True); time.sleep(60)\n"
    )
    (tmp_path / "run.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    with subprocess.Popen(
        [sys.executable, tmp_path / "run.py"], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        children = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert len(children) == 2
    end = time.monotonic() + 10
    while time.monotonic() < end and any(map(_runs, children)):
        time.sleep(0.02)
    assert not any(map(_runs, children))


def _runs(pid: int) -> bool:
    """Whether a process is there and not only waited for."""
    status = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("threads", "workers", "each"), [(0, 1, 0), (3, 4, 3), (1, 9, 1), (0, 100_000, 1)]
)
def test_threads_of_each(threads: int, workers: int, each: int) -> None:
    assert shared_threads(threads, workers) == each
