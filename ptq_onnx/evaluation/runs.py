"""A model, and a reference beside it, run over images: here, or by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ptq_onnx.errors import ConfigError
from ptq_onnx.evaluation.network import Model, Network
from ptq_onnx.evaluation.outputs import Values
from ptq_onnx.images.preprocess import FloatArray
from ptq_onnx.images.source import ImageSource
from ptq_onnx.runtime.processes import Processes, shared_threads

Found = dict[str, Values]
Names = tuple[str | None, str | None]


class Runs:
    """The outputs of ``tested``, and of ``trusted`` where there is one, batch by batch.

    ``models``: what they were opened from; ``workers``: processes that run them, here where 1.
    Raises ConfigError where several cannot open what was given.
    """

    def __init__(
        self,
        tested: Network,
        trusted: Network | None,
        models: tuple[Any, Model | None],
        names: Names,
        threads: int,
        workers: int,
    ) -> None:
        self._tested, self._trusted, self._workers = tested, trusted, workers
        self._opened = models, names, shared_threads(threads, workers)
        if workers > 1 and not isinstance(models[0], str | Path | bytes):
            raise ConfigError(
                "--workers needs a model that each of them opens: leave it at 1 here."
            )

    def over(
        self, images: ImageSource, batch_size: int
    ) -> Iterator[tuple[list[str], Found, Found | None]]:
        """Names of the images, outputs and the reference's outputs, in the images' order."""
        if self._workers == 1:
            for names, batch in images.named_batches(batch_size):
                found = self._tested(batch)
                yield names, found, None if self._trusted is None else self._trusted(batch)
            return
        with Processes(self._workers, open_networks, *self._opened) as processes:
            made = processes.beside(images.named_batches(batch_size))
            for names, (found, floats, whole) in made:
                self._tested.whole |= whole[0]
                if self._trusted is not None:
                    self._trusted.whole |= whole[1]
                yield names, found, floats


def open_networks(
    models: tuple[Model, Model | None], names: Names, threads: int
) -> Callable[[FloatArray], tuple[Found, Found | None, tuple[set[str], set[str]]]]:
    """What a process runs: the outputs of both models for images [B, C, H, W], and those that
    turned out not to be batches."""
    tested = Network(models[0], threads, name=names[0])
    trusted = None if models[1] is None else Network(models[1], threads, name=names[1])

    def run(batch: FloatArray) -> tuple[Found, Found | None, tuple[set[str], set[str]]]:
        found = tested(batch)
        floats = None if trusted is None else trusted(batch)
        return found, floats, (tested.whole, set() if trusted is None else trusted.whole)

    return run
