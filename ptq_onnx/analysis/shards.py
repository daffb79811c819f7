"""Variants of a model, run here or by several processes, which find the same.

Each process has the model from a file that all of them map, and takes the next few variants when it
is done with the last: in the order of the segments, so that it runs the background once, and no
more of it than they need. What a run gives is judged where it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Generic, Self, TypeVar

import onnx_ir as ir

from ptq_onnx.analysis.modules import Module
from ptq_onnx.analysis.segments import Specs
from ptq_onnx.analysis.variants import Images, Outcome, Runs
from ptq_onnx.files.held_folder import scratch_folder
from ptq_onnx.preparation.shared_models import read_shared, write_shared
from ptq_onnx.runtime.processes import Processes, shared_threads

T = TypeVar("T")
Variants = Mapping[Module, Specs]
Part = tuple[int, Specs, Variants, bool]
"""A number of the background, the background, variants, and whether the whole of it is run."""
PARTS = 4
"""Of the variants for each process: several, as some are quicker than others."""


@dataclass(frozen=True)
class Way:
    """What runs need (see :class:`Runs`), and how many processes make them."""

    model: ir.Model
    features: str | None
    rounded: ir.Model | None
    images: Images
    threads: int = 0
    workers: int = 1

    def runs(self) -> Runs:
        """Runs that begin with no session open."""
        return Runs(self.model, self.threads, self.features, self.rounded)


class Shards(Generic[T]):
    """What ``judge``, a function of a module, says of each variant; a context manager."""

    def __init__(self, way: Way, judge: Callable[[Outcome], T]) -> None:
        self._way, self._judge = way, judge
        self._open = ExitStack()
        self._processes: Processes | None = None
        self._backgrounds = 0

    def __enter__(self) -> Self:
        way = self._way
        if way.workers == 1:
            return self
        try:
            folder = self._open.enter_context(scratch_folder())
            paths = [write_shared(m, folder / f"{n}.onnx") for n, m in _models(way).items()]
            how = way.images, way.features, shared_threads(way.threads, way.workers), self._judge
            opened = Processes(way.workers, open_runs, paths, *how)
            self._processes = self._open.enter_context(opened)
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def each(
        self, background: Specs, variants: Variants, progress: Callable[[int], None] | None
    ) -> tuple[dict[Module, T], T]:
        """Of every variant, and of the background itself."""
        found: dict[Module, T] = {}
        baseline: T | None = None
        if self._processes is None:
            way = self._way
            found, baseline = way.runs().each(
                background, variants, way.images, self._judge, progress
            )
        else:
            tell, parts = progress or (lambda _: None), self._parts(background, variants)
            for (*_, part, _), (judged, last) in self._processes.beside((p, p) for p in parts):
                found |= judged
                baseline = last
                tell(len(part))
        assert baseline is not None
        return found, baseline

    def _parts(self, background: Specs, variants: Variants) -> Sequence[Part]:
        """The last of them gives the baseline."""
        self._backgrounds += 1
        groups = self._way.runs().groups(variants)
        count = max(min(PARTS * self._way.workers, len(groups)), 1)
        cuts = [len(groups) * number // count for number in range(count + 1)]
        parts = [groups[a:b] for a, b in pairwise(cuts)]
        return [
            (
                self._backgrounds,
                background,
                {m: variants[m] for g in part for m in g.modules},
                number == count - 1,
            )
            for number, part in enumerate(parts)
        ]


def open_runs(
    paths: Sequence[Path],
    images: Images,
    features: str | None,
    threads: int,
    judge: Callable[[Outcome], T],
) -> Callable[[Part], tuple[dict[Module, T], T | None]]:
    """What a process does with a part of the variants."""
    models = [read_shared(path) for path in paths]
    way = Way(models[0], features, models[1] if len(models) > 1 else None, images, threads)
    opened: dict[int, Runs] = {}

    def run(part: Part) -> tuple[dict[Module, T], T | None]:
        number, background, variants, whole = part
        if number not in opened:
            opened.clear()
            opened[number] = way.runs()
        return opened[number].each(background, variants, images, judge, None, whole=whole)

    return run


def _models(way: Way) -> dict[str, ir.Model]:
    models = {"model": way.model}
    return models if way.rounded is None else {**models, "rounded": way.rounded}
