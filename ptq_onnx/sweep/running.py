"""A sweep run: the cells that are not done go to Ray, and what comes of them is a row each."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq_onnx.errors import ConfigError, PtqError, one_line
from ptq_onnx.files.held_folder import LOCK, clear, locked, remove, unfinished, unlock
from ptq_onnx.files.text_file import write_text
from ptq_onnx.sweep import need
from ptq_onnx.sweep.cell import (
    DONE,
    NOTICE,
    REFUSED,
    Row,
    failed,
    finished,
    keep_failure,
)
from ptq_onnx.sweep.cluster import Cluster, joined, started
from ptq_onnx.sweep.fingerprint import fingerprint, forget
from ptq_onnx.sweep.interrupts import interrupts
from ptq_onnx.sweep.matrix import Cell
from ptq_onnx.sweep.stages import MEASURE, NAMES, PREPARE, Measured, Schedule, Task, Written
from ptq_onnx.sweep.work import BETWEEN, Place, do

Told = Callable[[Row], Any]
"""Called with each row as it comes."""
Work = Callable[[Task, Place, str, int], Row | Written | Measured]
"""Called with a task, the sweep's place, the cell's mark and the attempt."""
ROUNDS, PAUSE = 100, 0.05
"""How often, and after how many seconds, leftovers are looked for."""
SECONDS = 1.0
"""How long a wait for tasks lasts, after which an interrupt is seen."""
AHEAD = 8
"""For so many tasks that run one is submitted besides, and two: whatever is submitted later, and
is more urgent, waits for them."""


@dataclass(frozen=True)
class Machines:
    """Where cells run: ``workers`` at a time on this machine, as many as fit where None, or on the
    cluster at ``address``. ``gpus``: of each cell, as Ray counts them."""

    workers: int | None = None
    address: str | None = None
    gpus: float = 0


@dataclass(frozen=True)
class Found:
    """Rows in the order of the cells; how many of them were done before; what must be said."""

    rows: tuple[Row, ...]
    before: int
    notes: tuple[str, ...]


class RayEnded(PtqError):
    """Ray is gone, or the node that runs the sweep."""


def run(
    cells: Sequence[Cell],
    folder: Path,
    machines: Machines,
    retries: int,
    begun: Callable[[int, int], Told],
    work: Work = do,
) -> Found:
    """Run all cells that are not done in ``folder``, each into its own below it.

    ``begun`` is called with the number of cells to run and of all, and returns what is told of
    each row. ``retries``: of a cell whose process ended; one that cannot be done fails at once.
    ``work``: what a process does with a task. Raises PtqError: RayEnded where Ray ends, after
    which another run goes on.
    """
    forget()
    need.forget()
    rows: dict[str, Row] = {}
    marks: dict[str, str] = {}
    todo: list[Cell] = []
    with _alone(folder):
        for cell in cells:
            found = _known(cell, folder, marks)
            if found is None:
                todo.append(cell)
            else:
                rows[cell.name] = found
        before = sum(row.status == DONE for row in rows.values())
        notes: list[str] = []
        told = begun(len(todo), len(cells))
        if todo:
            with closing(_run(todo, folder, machines, retries, marks, notes, work)) as coming:
                for row in coming:
                    rows[row.cell] = row
                    told(row)
    return Found(tuple(rows[cell.name] for cell in cells), before, tuple(notes))


def _known(cell: Cell, folder: Path, marks: dict[str, str]) -> Row | None:
    """The row of a cell that need not run; else its mark is noted."""
    if cell.config is None:
        return Row.of(cell, REFUSED, cell.refusal)
    try:
        marks[cell.name] = fingerprint(cell)
    except (PtqError, OSError) as error:  # its model or images cannot be read
        return keep_failure(failed(cell, one_line(error), 1), folder / cell.name)
    return finished(cell, folder, marks[cell.name])


def _run(
    cells: Sequence[Cell],
    folder: Path,
    machines: Machines,
    retries: int,
    marks: Mapping[str, str],
    notes: list[str],
    work: Work,
) -> Generator[Row]:
    """The rows of the cells, as they come, the largest models first."""
    needs = {cell.name: need.memory_of(cell) for cell in cells}
    ordered = sorted(cells, key=lambda cell: -needs[cell.name])
    threads = max(need.cores_of(cell) for cell in cells)
    environment = {"OMP_NUM_THREADS": str(max(c.config.threads for c in cells if c.config) or 1)}
    place = Place(folder.resolve(), secrets.token_hex(16))
    with ExitStack() as stack:
        check = stack.enter_context(interrupts())
        remove(folder / BETWEEN)  # of images that may have changed since
        stack.callback(remove, folder / BETWEEN)
        stack.callback(_clear, cells, folder)  # last, when no process is left that could write
        if machines.address is None:
            memory = need.free_memory()
            fit = need.fitting(need.free_cores(), memory, threads, max(needs.values()))
            slots = machines.workers or fit
            if all(cell.val is None for cell in cells):
                slots = min(slots, len(cells))
            here = started(slots * threads, memory, environment, _gpus_here(machines.gpus))
            cluster = stack.enter_context(here)
        else:
            cluster = stack.enter_context(joined(machines.address, environment))
            memory = _largest_node(cluster.ray, threads, machines.gpus)
        notes.extend(_too_large(needs, memory))
        write_text(folder / NOTICE, place.notice)
        stack.callback((folder / NOTICE).unlink, missing_ok=True)
        remote = cluster.ray.remote(max_retries=0)(work)

        def submit(task: Task, attempt: int) -> Any:
            cell = task.cell
            asked = remote.options(
                num_cpus=need.cores_of(cell, task.stage),
                num_gpus=0 if task.stage == PREPARE else machines.gpus,
                memory=min(need.memory_of(cell, task.stage), memory),
                name=f"{NAMES[task.stage]} {cell.name}",
            )
            return asked.remote(task, place, marks[cell.name], attempt)

        schedule = Schedule(ordered, need.prepared_alike)
        least = min(need.cores_of(cell, MEASURE) for cell in cells)

        def most() -> int:
            running = int(cluster.cores() // least)
            return running + 2 + running // AHEAD

        yield from _rows(cluster, schedule, folder, submit, retries, check, most)
        if schedule.alone:
            notes.append(
                f"{schedule.alone} cells were measured by one process each: some of the images"
                " cannot be read, or the outputs on a part of them could not be kept."
            )


def _rows(
    cluster: Cluster,
    schedule: Schedule,
    folder: Path,
    submit: Callable[[Task, int], Any],
    retries: int,
    check: Callable[[], None],
    most: Callable[[], int],
) -> Generator[Row]:
    """Submit what can run, no more than ``most`` at a time, and take what is finished; a task whose
    process ended is submitted again. ``check`` is called every second."""
    ray = cluster.ray
    gone = ray.exceptions.LocalRayletDiedError, ray.exceptions.NodeDiedError
    fatal = (ray.exceptions.RaySystemError, *(gone if cluster.single else ()))
    waiting: dict[Any, tuple[Task, int]] = {}
    try:
        while True:
            while len(waiting) < most() and (task := schedule.next()) is not None:
                waiting[submit(task, 1)] = task, 1
            if not waiting:
                return
            check()
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=SECONDS)
            if not done and cluster.ended():
                raise ConnectionError("its head process is gone")
            for one in done:
                task, attempt = waiting.pop(one)
                row: Row | None
                try:
                    row = schedule.took(task, ray.get(one))
                except ray.exceptions.RayError as error:
                    if isinstance(error, fatal):
                        raise
                    if attempt <= retries:
                        waiting[submit(task, attempt + 1)] = task, attempt + 1
                        continue
                    row = schedule.lost(task, failed(task.cell, _ended(error, attempt), attempt))
                    if row is not None:
                        clear((folder / task.cell.name).resolve())
                        keep_failure(row, folder / task.cell.name)
                if row is not None:
                    yield row
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise RayEnded(
            f"Ray ended with {schedule.left} cells to do ({one_line(error)[:100]}): the same"
            " command goes on where this one ended."
        ) from error


def _ended(error: Exception, attempts: int) -> str:
    """Why a process ended, in a few words."""
    kind = type(error).__name__
    words = {
        "OutOfMemoryError": "the node ran out of memory, and its process was ended",
        "WorkerCrashedError": "its process ended (killed, or a crash)",
        "NodeDiedError": "its node is gone",
    }
    again = f", {attempts} times" if attempts > 1 else ""
    return f"{words.get(kind, f'{kind}: {one_line(error)[:160]}')}{again}"


def _gpus_here(wanted: float) -> int:
    """The GPUs of this machine, where cells ask for any. Raises ConfigError without enough."""
    if not wanted:
        return 0
    from ptq_onnx.runtime.devices import cuda_devices

    found = cuda_devices()
    if found < wanted:
        raise ConfigError(
            f"gpus: {wanted:g} for each cell, but NVIDIA's driver sees {found} here: leave gpus"
            " out, or join a cluster by --address."
        )
    return found


def _too_large(needs: Mapping[str, int], memory: int) -> list[str]:
    """A note on cells that are expected to need more than there is, which run one at a time."""
    large = [name for name, size in needs.items() if size > memory]
    if not large:
        return []
    return [
        f"{len(large)} cells are expected to need more memory than the {memory / 1e9:.1f} GB that"
        f" are free, most {max(needs.values()) / 1e9:.1f} GB; the first: {large[0]}."
    ]


def _largest_node(ray: Any, threads: int, gpus: float = 0) -> int:
    """Bytes of memory that the largest node of a cluster gives. Raises ConfigError where no node
    has the cores and the GPUs that a cell asks for."""
    nodes = [node["Resources"] for node in ray.nodes() if node.get("Alive")]
    fit = [node for node in nodes if node.get("CPU", 0) >= threads and node.get("GPU", 0) >= gpus]
    if not fit:
        asked = f"{threads} cores" + (f" and {gpus:g} GPUs" if gpus else "")
        what = "threads or gpus" if gpus else "threads"
        raise ConfigError(f"No node of the cluster has {asked}: lower {what}.")
    return int(max(node.get("memory", 0) for node in fit))


def _clear(cells: Sequence[Cell], folder: Path) -> None:
    """Remove what processes that were ended have left beside the cells' folders."""
    parents = {(folder / cell.name).resolve().parent for cell in cells}
    for _ in range(ROUNDS):  # a killed process holds its files until its last thread is gone
        left = [place for parent in parents for place in unfinished(parent)]
        if not left:
            break
        for place in left:
            clear(place)
        time.sleep(PAUSE)
    for parent in parents:
        with suppress(OSError):
            parent.rmdir()  # of a model whose cells never began


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder of the sweep, for one sweep at a time. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = locked(folder)
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be written: {error.strerror}.") from error
    if lock is None and os.name != "nt":
        raise ConfigError(f"Another sweep runs into {folder}: wait for it, or name another folder.")
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        unlock(lock)
