"""Files that are tried, run over the same images again and again: here, or by processes that stay.

The images are read once for each file, here; each process opens the file when its first batch of it
comes. Batches are the same wherever they are run, and are folded in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from ptq_onnx.evaluation.network import Network
from ptq_onnx.evaluation.outputs import Values
from ptq_onnx.images.preprocess import FloatArray
from ptq_onnx.runtime.processes import Processes, shared_threads

Found = dict[str, Values]
Item = tuple[str, str, FloatArray]
"""A file, what errors call it, and a batch."""


class TrialRuns:
    """``workers`` processes, none where 1; a context manager."""

    def __init__(self, threads: int, workers: int) -> None:
        self._threads, self._workers = threads, workers
        self._open = ExitStack()
        self._processes: Processes | None = None

    def __enter__(self) -> Self:
        if self._workers > 1:
            threads = shared_threads(self._threads, self._workers)
            opened = Processes(self._workers, open_trials, threads)
            self._processes = self._open.enter_context(opened)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def open(self, model: Path, name: str) -> Network:
        """The file, for what it says of itself; ``name``: what errors call it. Raises
        ModelError."""
        return Network(model, self._threads, name=name)

    def over(
        self, model: Path, network: Network, batches: Iterable[tuple[list[str], FloatArray]]
    ) -> Iterator[tuple[list[str], Found]]:
        """Names and outputs of each batch of images [B, C, H, W], in their order; ``network``:
        the file, which learns what of its outputs is not one for each image. Raises ModelError."""
        if self._processes is None:
            yield from ((names, network(batch)) for names, batch in batches)
            return
        items = ((names, (str(model), network.name, batch)) for names, batch in batches)
        for names, (found, whole) in self._processes.beside(items):
            network.whole |= whole
            yield names, found


def open_trials(threads: int) -> Callable[[Item], tuple[Found, set[str]]]:
    """What a process does with a batch of a file; the file before it is closed."""
    opened: dict[str, Network] = {}

    def run(item: Item) -> tuple[Found, set[str]]:
        path, name, batch = item
        if path not in opened:
            opened.clear()
            opened[path] = Network(path, threads, name=name)
        return opened[path](batch), opened[path].whole

    return run
