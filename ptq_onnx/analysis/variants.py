"""Runs of one model in which what is quantized differs in a few tensors.

A run starts at the graph segment that holds those tensors, from activations that all runs share,
and ends in a session that all runs share (see segments.py). Memory holds the images, one activation
per image, and the weights of a few sessions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.analysis.modules import Module
from ptq_onnx.analysis.segments import Segments, Specs
from ptq_onnx.calibration.class_output import float_outputs
from ptq_onnx.errors import ModelError

Array = NDArray[np.float32]
Outcome = tuple[tuple[Array, ...], Array | None]
"""Outputs, as logits [N, classes], and features [N, …] where the model has them."""


@dataclass(frozen=True)
class Images:
    """Model inputs [N, C, H, W], run ``batch`` at a time.

    ``count``: how many of them are images; the others fill up the last batch of a model
    with a fixed batch size.
    """

    values: Array
    batch: int = 8
    count: int = 0

    @property
    def real(self) -> int:
        """The number of images."""
        return self.count or len(self.values)


@dataclass(frozen=True)
class Group:
    """Modules of the same tensors, and the first and the last segment that these are in."""

    modules: tuple[Module, ...]
    start: int
    end: int


class Runs:
    """Runs of one model in which the specs differ from a background in some tensors."""

    def __init__(
        self,
        model: ir.Model,
        threads: int,
        features: str | None,
        rounded: ir.Model | None = None,
    ) -> None:
        self.outputs = float_outputs(model)
        if not self.outputs:
            raise ModelError("The model has no output of floats to measure modules at.")
        self.segments = Segments(model, self.outputs, threads, features=features, rounded=rounded)
        self.last = len(self.segments.parts) - 1
        self.baseline: Outcome = (), None
        self._at: tuple[int, Array] | None = None
        """How far the background was run, and what the next segment reads."""

    def measured(self, images: Images) -> Outcome:
        """Outputs and features of the run just made, without what only fills up a batch."""
        seen, count = self.segments.seen, len(images.values)
        ends = tuple(e[: images.real] if len(e) == count else e for e in self.segments.ends)
        return ends, None if seen is None else seen[: images.real]

    def each(
        self,
        background: Specs,
        variants: Mapping[Module, Specs],
        images: Images,
        progress: Callable[[int], None] | None,
        *,
        whole: bool = True,
    ) -> Iterator[tuple[Module, Outcome]]:
        """The outcome of every variant; ``baseline`` afterwards: that of the background, where the
        ``whole`` of it is run, and not only what the variants need. Called again, it goes on where
        it was: with the same background, and variants that begin no earlier."""
        groups = self.groups(variants)
        waiting: dict[int, list[Group]] = defaultdict(list)
        for group in groups:
            waiting[group.start].append(group)
        first, value = self._at or (0, images.values)
        stop = self.last if whole else max((g.start for g in groups), default=first)
        for number in range(first, stop + 1):
            for group in waiting[number]:
                end, specs = group.end, variants[group.modules[0]]
                found = self.segments.run(value, number, end, specs, images.batch)
                if end < self.last:
                    found = self.segments.run(
                        found, end + 1, self.last, background, images.batch, "rest"
                    )
                if progress is not None:
                    progress(len(group.modules))
                outcome = self.measured(images)
                yield from ((module, outcome) for module in group.modules)
            if whole or number < stop:
                value = self.segments.run(value, number, number, background, images.batch)
        self._at = stop, value
        if whole:
            self.baseline = self.measured(images)

    def groups(self, modules: Iterable[Module]) -> list[Group]:
        """Modules of the same tensors, which are one run, in the order of the runs."""
        places = self.segments.places()
        same: dict[frozenset[str], list[Module]] = defaultdict(list)
        for module in modules:
            same[module.tensors].append(module)
        found = []
        for tensors, group in same.items():
            touched = [places.get(t, 0) for t in tensors]
            found.append(Group(tuple(group), min(touched), max(touched)))
        return sorted(found, key=lambda g: (g.start, g.end))
