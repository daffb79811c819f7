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
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self, TypeVar

from ptq_onnx.errors import ConfigError, PtqError
from ptq_onnx.runtime.devices import chosen, take_device
from ptq_onnx.runtime.garbage import search_seldom

T = TypeVar("T")
SECONDS = 5.0
"""How long a process has to end by itself."""

Opener = Callable[..., Callable[[Any], Any]]
"""A function of a module, called in each process; returns what is called with each item."""


class _Process:
    """One of them, and the pipe to it. ``asked``: items whose results it still owes."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._end, theirs = context.Pipe()
        self.asked = 0
        self._process: BaseProcess = context.Process(target=_work, args=(theirs,), daemon=True)
        try:
            self._process.start()
        except BaseException:
            self._end.close()
            raise
        finally:
            theirs.close()

    @property
    def usable(self) -> bool:
        """Whether it can be given something else to do."""
        return self.asked == 0 and self._process.is_alive()

    def open(self, opener: Opener, arguments: tuple[Any, ...], device: str) -> None:
        """Let it open what items are for, in place of what it had open. Raises PtqError."""
        self._send((opener, arguments, device))

    def shut(self) -> None:
        """Let go of what is open. Raises PtqError."""
        self._send(None)

    def ask(self, item: Any) -> None:
        """Send an item. Raises PtqError where the process ended."""
        self._send((item,))
        self.asked += 1

    def result(self) -> Any:
        """Of the item that was sent first. Raises what the work on it raises, and PtqError."""
        try:
            error, result = self._end.recv()
        except (EOFError, OSError) as broken:
            raise self._ended() from broken
        self.asked -= 1
        if error is not None:
            raise error
        return result

    def leave(self) -> None:
        """End its pipe, and so it; see :meth:`wait`."""
        self._end.close()

    def wait(self) -> None:
        """Until it is gone."""
        self._process.join(SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _send(self, message: Any) -> None:
        try:
            self._end.send(message)
        except OSError as error:
            raise self._ended() from error

    def _ended(self) -> PtqError:
        self._process.join(SECONDS)
        return PtqError(
            f"A worker process ended (exit code {self._process.exitcode}): killed, or out of"
            " memory; give fewer --workers."
        )


_IDLE: ContextVar[list[_Process] | None] = ContextVar("idle", default=None)


@contextmanager
def kept_processes() -> Iterator[None]:
    """Processes that are done stay meanwhile, for the next :class:`Processes`: starting one takes
    seconds, opening another model in it little."""
    if _IDLE.get() is not None:
        yield
        return
    idle: list[_Process] = []
    before = _IDLE.set(idle)
    try:
        yield
    finally:
        _IDLE.reset(before)
        _end(idle)


def _end(processes: list[_Process]) -> None:
    for process in processes:
        process.leave()
    for process in processes:
        process.wait()


class Processes:
    """``count`` processes in which ``opener(*arguments)`` is at work; a context manager.

    Raises ConfigError below 1.
    """

    def __init__(self, count: int, opener: Opener, *arguments: Any) -> None:
        if count < 1:
            raise ConfigError(f"--workers must be at least 1, got {count}.")
        self._processes: list[_Process] = []
        idle = _IDLE.get() or []
        try:
            while idle and len(self._processes) < count:
                process = idle.pop()
                if process.usable:
                    self._processes.append(process)
                else:
                    _end([process])
            while len(self._processes) < count:
                self._processes.append(_Process())
            for process in self._processes:  # when all have been started, as one waits for it
                process.open(opener, arguments, chosen())
        except BaseException:
            _end(self._processes)
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
        count, busy, place = len(self._processes), 0, 0
        for item in items:
            if busy == count:
                yield self._processes[place % count].result()
                busy -= 1
            self._processes[place % count].ask(item)
            place, busy = place + 1, busy + 1
        for index in range(place - busy, place):
            yield self._processes[index % count].result()

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
        """End the processes, or let them wait for something else to do, where they are kept."""
        idle, done = _IDLE.get(), self._processes
        self._processes = []
        if idle is not None:
            for process in [process for process in done if process.usable]:
                with suppress(PtqError):
                    process.shut()
                    idle.append(process)
                    done.remove(process)
        _end(done)


def _work(end: Connection) -> None:
    """What a process does: open, then answer item by item, until the pipe ends."""
    search_seldom()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent ends this one
    run: Callable[[Any], Any] | None = None
    with suppress(EOFError, OSError):
        while True:
            match end.recv():
                case None:
                    run = None
                case opener, arguments, device:
                    run = None  # before another takes its memory
                    take_device(device)
                    run = _opened(opener, arguments)
                case (item,):
                    answer: tuple[Exception | None, Any]
                    try:
                        assert run is not None
                        answer = None, run(item)
                    except Exception as error:
                        answer = _plain(error), None
                    end.send(answer)


def _opened(opener: Opener, arguments: tuple[Any, ...]) -> Callable[[Any], Any]:
    """What answers; where opening fails, every item does, with the reason."""
    try:
        return opener(*arguments)
    except Exception as error:
        fault: Exception = error

        def run(_: Any) -> Any:
            raise fault

        return run


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
