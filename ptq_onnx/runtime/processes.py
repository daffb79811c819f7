"""Processes that each hold something opened once, as a session, and work on items in turn.

Results come in the order of the items, whatever the processes' speed, so that who folds them does
so as one process would: the same bytes. A process waits for one item at a time, so memory does not
grow with their number. It ends with the pipe that it reads: when its parent does, even killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self, TypeVar

from ptq_onnx.errors import ConfigError, PtqError
from ptq_onnx.runtime.devices import chosen, take_device

T = TypeVar("T")
SECONDS = 5.0
"""How long a process has to end by itself."""

Opener = Callable[..., Callable[[Any], Any]]
"""A function of a module, called in each process; returns what is called with each item."""


class Processes:
    """``count`` processes in which ``opener(*arguments)`` is at work; a context manager.

    Raises ConfigError below 1.
    """

    def __init__(self, count: int, opener: Opener, *arguments: Any) -> None:
        if count < 1:
            raise ConfigError(f"--workers must be at least 1, got {count}.")
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes: list[BaseProcess] = []
        try:
            for _ in range(count):
                mine, theirs = context.Pipe()
                process = context.Process(
                    target=_work, args=(theirs, opener, arguments, chosen()), daemon=True
                )
                process.start()
                theirs.close()
                self._ends.append(mine)
                self._processes.append(process)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """The results of all items, in their order. Raises what the work on an item raises, as it
        comes to that item, and PtqError where a process ended."""
        count, busy, place = len(self._ends), 0, 0
        for item in items:
            if busy == count:
                yield self._result(place % count)
                busy -= 1
            self._send(place % count, item)
            place, busy = place + 1, busy + 1
        for index in range(place - busy, place):
            yield self._result(index % count)

    def beside(self, items: Iterable[tuple[T, Any]]) -> Iterator[tuple[T, Any]]:
        """The same of pairs, of which the first stays here and comes back with the result of the
        second."""
        waiting: deque[T] = deque()

        def sent() -> Iterator[Any]:
            for kept, item in items:
                waiting.append(kept)
                yield item

        for result in self.map(sent()):
            yield waiting.popleft(), result

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(SECONDS)
            if process.is_alive():
                process.kill()
                process.join()

    def _send(self, index: int, item: Any) -> None:
        try:
            self._ends[index].send(item)
        except OSError as error:
            raise self._ended(index) from error

    def _result(self, index: int) -> Any:
        try:
            error, result = self._ends[index].recv()
        except (EOFError, OSError) as broken:
            raise self._ended(index) from broken
        if error is not None:
            raise error
        return result

    def _ended(self, index: int) -> PtqError:
        process = self._processes[index]
        process.join(SECONDS)
        return PtqError(
            f"A worker process ended (exit code {process.exitcode}): killed, or out of memory; give"
            " fewer --workers."
        )


def _work(end: Connection, opener: Opener, arguments: tuple[Any, ...], device: str) -> None:
    """What a process does: open, then answer item by item until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent ends this one
    take_device(device)
    with suppress(EOFError, OSError):
        try:
            run = opener(*arguments)
        except Exception as error:
            fault: Exception = error

            def run(_: Any) -> Any:
                raise fault

        while True:
            item = end.recv()
            answer: tuple[Exception | None, Any]
            try:
                answer = None, run(item)
            except Exception as error:
                answer = _plain(error), None
            end.send(answer)


def _plain(error: Exception) -> Exception:
    """The error as it can be sent; ours as it is, with what it says."""
    if isinstance(error, PtqError):
        return type(error)(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


def shared_threads(threads: int, workers: int) -> int:
    """Threads of one worker of several where the user leaves them to the runtime (0)."""
    if threads or workers < 2:
        return threads
    return max(1, (os.cpu_count() or 1) // workers)
