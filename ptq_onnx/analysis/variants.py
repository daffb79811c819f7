"""Runs of one model in which what is quantized differs in a few tensors.

A run starts at the graph segment that holds those tensors, from activations that all runs share,
and ends in a session that all runs share (see segments.py). ``LANES`` runs go on beside each other:
opening a session, most of it Python's work, is as long as a run of a few images. Memory holds the
images, one activation per image, and the weights of a few sessions for each lane.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.analysis.modules import Module
from ptq_onnx.analysis.segments import Passed, Segments, Specs
from ptq_onnx.calibration.class_output import float_outputs
from ptq_onnx.errors import ModelError

Array = NDArray[np.float32]
T = TypeVar("T")
LANES = 2
"""Runs beside each other, at most: each may hold a session of the whole model."""
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

    def spread(self, count: int) -> Images:
        """``count`` of the images, spread evenly over all; filled up as these are."""
        chosen = np.linspace(0, self.real - 1, count).round().astype(int)
        if self.count:
            chosen = np.concatenate([chosen, np.repeat(chosen[-1:], -count % self.batch)])
        return Images(self.values[chosen], self.batch, count)


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
        threads = threads or os.cpu_count() or 1
        self._lanes = min(LANES, threads)
        each = threads // self._lanes
        self.segments = Segments(model, self.outputs, each, features=features, rounded=rounded)
        self.last = len(self.segments.parts) - 1
        self._at: tuple[int, Passed] | None = None
        """How far the background was run, and what the next segment reads."""

    def whole(self, specs: Specs, images: Images) -> Outcome:
        """Outputs and features of the whole model with those specs."""
        return _measured(
            self.segments.run(images.values, 0, self.last, specs, images.batch), images
        )

    def each(
        self,
        background: Specs,
        variants: Mapping[Module, Specs],
        images: Images,
        judge: Callable[[Outcome], T],
        progress: Callable[[int], None] | None,
        *,
        whole: bool = True,
    ) -> tuple[dict[Module, T], T | None]:
        """What ``judge`` says of every variant, and of the background, where the ``whole`` of it
        is run and not only what the variants need. Called again, it goes on where it was: with
        the same background, and variants that begin no earlier."""
        groups = self.groups(variants)
        waiting: dict[int, list[Group]] = defaultdict(list)
        for group in groups:
            waiting[group.start].append(group)
        first, passed = self._at or (0, Passed(images.values))
        stop = self.last if whole else max((g.start for g in groups), default=first)
        found: dict[Module, T] = {}
        begun: deque[tuple[Group, Future[T]]] = deque()

        def wait_for(so_many: int) -> None:
            """Until no more than these are left of the runs that were begun."""
            while len(begun) > so_many:
                group, future = begun.popleft()
                found.update(dict.fromkeys(group.modules, future.result()))
                if progress is not None:
                    progress(len(group.modules))

        one = partial(self._judged, judge, background, variants, images)
        pool = ThreadPoolExecutor(self._lanes, "runs")
        try:
            for number in range(first, stop + 1):
                value, ahead = passed.value, None
                if whole or number < stop:
                    go_on = value, number, number, background, images.batch
                    ahead = pool.submit(self.segments.run, *go_on)
                for group in waiting[number]:
                    begun.append((group, pool.submit(one, value, group)))
                    wait_for(2 * self._lanes)
                passed = passed if ahead is None else ahead.result()
            wait_for(0)
        finally:
            pool.shutdown(cancel_futures=True)
        self._at = stop, passed
        return found, judge(_measured(passed, images)) if whole else None

    def _judged(
        self,
        judge: Callable[[Outcome], T],
        background: Specs,
        variants: Mapping[Module, Specs],
        images: Images,
        value: Array,
        group: Group,
    ) -> T:
        """A run that starts at the group's first segment from ``value``."""
        run, specs = self.segments.run, variants[group.modules[0]]
        passed = run(value, group.start, group.end, specs, images.batch)
        if group.end < self.last:
            behind = group.end + 1, self.last
            passed = run(passed.value, *behind, background, images.batch, "rest")
        return judge(_measured(passed, images))

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


def _measured(passed: Passed, images: Images) -> Outcome:
    """Outputs and features, without what only fills up a batch."""
    count = len(images.values)
    ends = tuple(e[: images.real] if len(e) == count else e for e in passed.outputs)
    return ends, None if passed.features is None else passed.features[: images.real]
