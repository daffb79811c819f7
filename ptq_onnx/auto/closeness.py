"""How close a quantized file is to the float one: at every output, and in its answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.analysis.comparison_results import Closeness
from ptq_onnx.auto.trial_runs import TrialRuns
from ptq_onnx.evaluation.evaluate import Progress
from ptq_onnx.evaluation.metrics.metric import Metric, Scoring
from ptq_onnx.evaluation.outputs import Tallies, Values, decibels, pairs, percent, top_classes
from ptq_onnx.images.source import ImageSource

Labels = NDArray[np.int64]
BATCH = 8
HELD = 256_000_000
"""Bytes of the float model's outputs that stay in memory; what is beyond lies in files."""


class Recorded:
    """The float model's outputs on all images, for files to be compared with.

    ``truth``: the right classes, where ``labels_of``, asked with the number of classes once all
    images were read, gives them. ``main``: the output [batch, classes] that answers: with most
    right answers, else the first; None where there is none. ``metric``: what is lost of it is the
    drop, in place of top-1. ``trials``: where files are run; here where there is none. Raises
    ImageError, ModelError, ConfigError.
    """

    def __init__(
        self,
        model: Path,
        images: ImageSource,
        folder: Path,
        *,
        labels_of: Callable[[int], Labels] | None = None,
        threads: int = 0,
        progress: Progress | None = None,
        metric: Metric | None = None,
        trials: TrialRuns | None = None,
    ) -> None:
        self._trials = trials or TrialRuns(threads, 1)
        network = self._trials.open(model, "The float model")
        network.check(images.preprocess.shape)
        self.images, self.names, self.metric = images, network.names, metric
        self._folder, self._bytes = folder, 0
        self._batches: list[dict[str, Values]] = []
        tallies = Tallies(network.names)
        for _, found in self._trials.over(model, network, images.named_batches(BATCH)):
            tallies.add(found, network.whole)
            self._batches.append({name: self._kept(value) for name, value in found.items()})
            if progress is not None:
                progress(min(len(self._batches) * BATCH, len(images)), len(images))
        self.top = {t.name: self._top(t.name) for t in tallies.classes}
        self.count = len(images)
        self.main: str | None = next(iter(self.top), None)
        self.truth: Labels | None = None
        self.float_score: float | None = None
        """By the metric; known once a file was measured."""
        if labels_of is not None and self.top:
            truth = labels_of(max(t.width for t in tallies.classes))
            able = [t.name for t in tallies.classes if t.width > truth.max(initial=0)]
            self.main = max(able, key=lambda name: int((self.top[name] == truth).sum()))
            self.truth = truth

    def hits(self) -> NDArray[np.bool_]:
        """Which images the float model gets right."""
        assert self.main is not None
        return hits(self.top[self.main], self.truth)

    def measure(self, model: Path) -> tuple[Closeness, float | None]:
        """A file against the float model, and one standard error of its drop; None without
        labels. Raises ImageError, ModelError."""
        network = self._trials.open(model, "The quantized model")
        shared = pairs(network.names, self.names)
        tallies = Tallies(list(shared))
        scoring = None if self.metric is None else Scoring(self.metric, reference=True)
        top: list[Labels] = []
        main = next((n for n, o in shared.items() if o == self.main), None)
        runs = self._trials.over(model, network, self.images.named_batches(BATCH))
        for (names, found), floats in zip(runs, self._batches, strict=True):
            known = {n: floats[o] for n, o in shared.items() if o in floats}
            tallies.add(found, network.whole, known, network.loose)
            if scoring is not None:
                scoring.add(names, found, known)
            if main is not None:
                top.append(top_classes(found[main]))
        drop = error = agreement = None
        if main is not None and self.main is not None:
            after = np.concatenate(top)
            agreement = percent(int((after == self.top[self.main]).sum()), len(after))
            if self.truth is not None:
                before, right = self.hits(), hits(after, self.truth)
                drop, error = points_lost(before, right), drop_error(before, right)
        score = None if scoring is None else scoring.score()
        if score is not None:
            drop, error = score.lost, None
            self.float_score = score.float_value
        worst = tallies.worst
        at = next((t.name for t in tallies.ranked if t.sqnr == worst), None)
        several = at if len(tallies.each) > 1 else None
        value = None if score is None else score.value
        return Closeness(drop, decibels(worst) or 0.0, agreement, several, value), error

    def _kept(self, value: Values) -> Values:
        self._bytes += value.nbytes
        if self._bytes <= HELD:
            return value
        path = self._folder / f"output_{self._bytes}.npy"
        np.save(path, value)
        kept: Values = np.load(path, mmap_mode="r")
        return kept

    def _top(self, name: str) -> Labels:
        return np.concatenate([top_classes(batch[name]) for batch in self._batches])


def hits(top: Labels, truth: Labels | None) -> NDArray[np.bool_]:
    """Whether the top classes are the right ones."""
    return np.asarray(top == truth)


def points_lost(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> float:
    """The drop of top-1 between two lists of hits. Counted, not subtracted: the difference of two
    rounded shares may miss a bound it is on."""
    return 100 * (int(before.sum()) - int(after.sum())) / len(after)


def drop_error(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> float:
    """One standard error of the drop in points: √(b + c - (b - c)² / N) / N · 100.

    b and c count the images that only one of the two models gets right (McNemar's table). With
    none, one is assumed: so few images cannot rule it out.
    """
    b, c = int((before & ~after).sum()), int((after & ~before).sum())
    count = len(before)
    if b + c == 0:
        return 100 / count
    return 100 * math.sqrt(max(b + c - (b - c) ** 2 / count, 0)) / count
