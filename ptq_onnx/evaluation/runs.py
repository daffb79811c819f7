"""A model, and a reference beside it, run over images: here, or by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ptq_onnx.errors import ConfigError, ModelError
from ptq_onnx.evaluation.network import Model, Network
from ptq_onnx.evaluation.outputs import Values
from ptq_onnx.evaluation.recorded import NOTHING, Record, Recorder
from ptq_onnx.images.preprocess import FloatArray
from ptq_onnx.images.source import ImageSource
from ptq_onnx.runtime.processes import Processes, shared_threads

Found = dict[str, Values]
Names = tuple[str | None, str | None]


class Runs:
    """The outputs of ``tested``, and of ``trusted`` where there is one, batch by batch.

    ``models``: what they were opened from; ``workers``: processes that run them, here where 1.
    ``record``: the outputs of ``trusted``, or the place for them; not used by several processes.
    ``kept``: those of ``tested``, which are whole, as then ``record`` is: no model is run.
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
        record: Record | None = None,
        kept: Record | None = None,
    ) -> None:
        self._kept = kept
        self._tested, self._trusted, self._workers = tested, trusted, workers
        self._record = record
        self._opened = models, names, shared_threads(threads, workers)
        if workers > 1 and not isinstance(models[0], str | Path | bytes):
            raise ConfigError(
                "--workers needs a model that each of them opens: leave it at 1 here."
            )

    def over(
        self, images: ImageSource, batch_size: int
    ) -> Iterator[tuple[list[str], Found, Found | None]]:
        """Names of the images, outputs and the reference's outputs, in the images' order."""
        if self._kept is not None:
            yield from self._read(self._kept, images, batch_size)
            return
        if self._workers == 1:
            yield from self._here(images, batch_size)
            return
        with Processes(self._workers, open_networks, *self._opened) as processes:
            made = processes.beside(images.named_batches(batch_size))
            for names, (found, floats, whole) in made:
                self._tested.whole |= whole[0]
                if self._trusted is not None:
                    self._trusted.whole |= whole[1]
                yield names, found, floats

    def _here(
        self, images: ImageSource, batch_size: int
    ) -> Iterator[tuple[list[str], Found, Found | None]]:
        """In this process; the reference's outputs are read where they were kept."""
        trusted, record = self._trusted, self._record
        if trusted is None:
            for names, batch in images.named_batches(batch_size):
                yield names, self._tested(batch), None
            return
        kept = iter(()) if record is None else record.batches()
        with ExitStack() as stack:
            keep = None
            if record is not None and not record.exists:
                keep = stack.enter_context(Recorder(record)).add
            for names, batch in images.named_batches(batch_size):
                found = self._tested(batch)
                before, floats, whole = next(kept, NOTHING)
                if before == names:
                    trusted.whole |= whole
                else:  # other images could be read then
                    kept = iter(())
                    floats = trusted(batch)
                    if keep is not None:
                        keep(names, floats, trusted.whole)
                yield names, found, floats

    def _read(
        self, kept: Record, images: ImageSource, batch_size: int
    ) -> Iterator[tuple[list[str], Found, Found | None]]:
        """The outputs of both as they were kept; no image is read. Raises ModelError where they
        are not whole."""
        tested, trusted, record = self._tested, self._trusted, self._record
        mine, others = kept.batches(), iter(()) if record is None else record.batches()
        names = images.names
        for start in range(0, len(names), batch_size):
            wanted = names[start : start + batch_size]
            before, found, whole = next(mine, NOTHING)
            tested.whole |= whole
            beside, floats = wanted, None
            if trusted is not None:
                beside, floats, whole = next(others, NOTHING)
                trusted.whole |= whole
            if not before == beside == wanted:
                raise ModelError(
                    f"{tested.name}: the outputs on image '{wanted[0]}' that were kept are not"
                    " there any more: run it again."
                )
            yield wanted, found, floats


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
