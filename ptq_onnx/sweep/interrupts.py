"""An interrupt counts, even where it comes inside a library that loses it, as Ray does now and then
while it starts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """Inside, signals do what they did before, and are noted: what it returns raises
    KeyboardInterrupt once one has come. In another thread than the main one it does nothing."""
    asked: list[int] = []

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        old = before[signal.Signals(number)]
        if callable(old):
            old(number, frame)

    own = [number for number, old in before.items() if callable(old)]
    for number in own:
        signal.signal(number, note)
    try:
        yield check
    finally:
        for number in own:
            signal.signal(number, before[number])
