"""What the processes of ``test_processes.py`` do."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

from ptq_onnx.errors import ModelError
from ptq_onnx.runtime.devices import chosen


def squares(base: int) -> Callable[[int], tuple[int, int]]:
    """The later ones are the faster ones."""

    def run(item: int) -> tuple[int, int]:
        if item == 13:
            raise ModelError("13 is refused.")
        if item == 14:
            raise ZeroDivisionError("no")
        if item == 15:
            os._exit(7)
        time.sleep(0.02 * (item % 3 == 0))
        return base + item * item, os.getpid()

    return run


def refuses(path: str) -> Callable[[int], int]:
    raise ModelError(f"{path} cannot be opened.")


def waits(path: str) -> Callable[[int], int]:
    def run(_: int) -> int:
        Path(path).write_text(str(os.getpid()))
        time.sleep(60)
        return 0

    return run


def tells_device() -> Callable[[int], str]:
    return lambda _: chosen()


def tells_thresholds() -> Callable[[int], tuple[int, ...]]:
    return lambda _: gc.get_threshold()
