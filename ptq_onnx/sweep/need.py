"""How much memory and how many cores the stages of a cell take, by the size of its model."""

from __future__ import annotations

import os
from collections.abc import Hashable
from functools import cache
from pathlib import Path

from ptq_onnx.errors import PtqError
from ptq_onnx.files import model_size
from ptq_onnx.pipeline.several_inputs import taken_by
from ptq_onnx.sweep.matrix import Cell
from ptq_onnx.sweep.stages import FINISH, FLOAT, MEASURE, PREPARE, WRITE

BASE = 0.7e9
"""Bytes of a process with PyTorch and PPQ in it, before it has a model (measured: 0.4e9)."""
PER_BYTE = 5.0
"""Bytes for each byte of the model."""
WITH_REPORT = 0.5e9, 5.5
"""The same two besides, where every op is analysed."""
PREPARING = 0.45e9, 3.5
MEASURING = 0.7e9, 2.0
"""The same two of a process that prepares a model, and of one that runs it on images, and may have
PyTorch in it from what it did before."""
KEPT_FREE = 0.1
"""Share of the free memory that is not given out."""


def memory_of(cell: Cell, stage: int = WRITE) -> int:
    """Bytes that a stage of a cell is expected to need at most; ``WRITE`` is the whole of it where
    it is not measured in parts. See docs/scaling.md for what was measured."""
    assert cell.config is not None
    size = model_bytes(cell.model)
    if stage == PREPARE:
        return int(PREPARING[0] + PREPARING[1] * size)
    if stage in (FLOAT, MEASURE, FINISH):
        return int(MEASURING[0] + MEASURING[1] * size)
    extra, more = WITH_REPORT if cell.config.report else (0.0, 0.0)
    others = (cell.config.workers - 1) * (MEASURING[0] + MEASURING[1] * size)
    return int(BASE + extra + (PER_BYTE + more) * size + others)


def cores_of(cell: Cell, stage: int = WRITE) -> int:
    """Cores that a stage of a cell computes with."""
    assert cell.config is not None
    if stage == PREPARE:
        return 1
    return max(cell.config.threads, 1) * (cell.config.workers if stage == WRITE else 1)


def prepared_alike(cell: Cell) -> Hashable:
    """What decides the prepared model of a cell; None where the model cannot be read, or takes what
    the images decide."""
    config = cell.config
    assert config is not None
    return (cell.model, config.opset, config.size) if takes_pictures(cell.model) else None


@cache
def model_bytes(path: Path) -> int:
    """The size of a model, which is asked for with every task. Raises ModelError."""
    return model_size.model_bytes(path)


@cache
def takes_pictures(path: Path) -> bool:
    """Whether a model can be read, and takes pictures alone."""
    try:
        return taken_by(path).plain
    except PtqError:
        return False


def forget() -> None:
    """Read files anew."""
    model_bytes.cache_clear()
    takes_pictures.cache_clear()


def free_memory() -> int:
    """Bytes that this machine, or its container, has to give, but for a tenth."""
    available = _available()
    limit = _limit()
    found = available if limit is None else min(available, limit)
    return int((1 - KEPT_FREE) * found)


def free_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fitting(cores: int, memory: int, cell_cores: int, cell_memory: int) -> int:
    """How many of the largest cells run at a time, at least one."""
    return max(1, min(cores // cell_cores, memory // cell_memory))


def _available() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 8 << 30


def _limit() -> int | None:
    """What the control group has left; None without a limit."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            most = file.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            return None if most == "max" else max(int(most) - int(file.read()), 0)
    except (OSError, ValueError):
        return None
