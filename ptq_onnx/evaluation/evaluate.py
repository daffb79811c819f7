"""How good a model is: accuracy on labelled images, and closeness to a reference model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ptq_onnx.errors import ImageError, ModelError
from ptq_onnx.evaluation.metrics.metric import Metric, Score, Scoring
from ptq_onnx.evaluation.network import Classifier, Model, Network, session
from ptq_onnx.evaluation.outputs import OutputFigures, Tallies, Tally, Values, notes_on, pairs
from ptq_onnx.evaluation.recorded import Record
from ptq_onnx.evaluation.runs import Runs
from ptq_onnx.images.preprocess import FloatArray
from ptq_onnx.images.source import ImageSource

__all__ = ["Evaluation", "Progress", "evaluate", "logits", "session"]

Progress = Callable[[int, int], Any]
"""Called with (images done, images in all)."""


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measures; None where there is nothing to measure it against.

    ``top1``, ``top5`` (None below 5 classes) and ``agreement`` are percentages, of ``main``: the
    output [batch, classes], of several the one with the most right answers, else the first; None
    where no output is that. ``sqnr_db`` is in dB (higher is better), that of the worst output.
    ``count`` is the number of images. ``outputs``: each by itself; ``left_out``: those without
    figures, with the reason. ``whole``: outputs whose first dimension is not the batch.
    ``baseline``: the reference's own accuracy on the same images, where it was asked for.
    """

    count: int
    top1: float | None = None
    top5: float | None = None
    sqnr_db: float | None = None
    agreement: float | None = None
    outputs: tuple[OutputFigures, ...] = ()
    main: str | None = None
    left_out: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    baseline: Evaluation | None = None
    score: Score | None = None
    """By the metric that was asked for."""

    @property
    def notes(self) -> list[str]:
        """What must be said of the outputs besides their figures."""
        found = [f"Output {one}." for one in self.left_out]
        if self.whole:
            found.append(
                f"The first dimension of {', '.join(self.whole)} is not the batch: compared run by"
                " run, leaving out the runs of a filled-up batch."
            )
        guessed = () if self.score is None else self.score.guessed
        taken = [f"--metric {self.score.metric}: {one}." for one in guessed if self.score]
        return [*found, *notes_on(self.outputs), *taken]


def evaluate(
    model: Model | ort.InferenceSession,
    images: ImageSource,
    labels: NDArray[np.int64] | None = None,
    *,
    batch_size: int = 8,
    threads: int = 0,
    reference: Model | None = None,
    progress: Progress | None = None,
    names: tuple[str | None, str | None] = (None, None),
    features: Collection[str] = (),
    baseline: bool = False,
    workers: int = 1,
    metric: Metric | None = None,
    record: Record | None = None,
    kept: Record | None = None,
) -> Evaluation:
    """Run a model, and a reference beside it, in ONNX Runtime with its default optimizations.

    ``model``: a file, its bytes, or a session that is open, on whatever device.
    ``labels`` int64 [N] belong to ``images.names``. Against ``reference``: SQNR and cosine of each
    output, 10·log10(Σ fp² / Σ (fp − q)²) with the sums over all images and values, and the share
    of images with the same top class where the output is [batch, classes]. ``names``: what errors
    call the two models. ``features``: outputs that look like [batch, classes] and are none; not
    asked where there are labels. ``baseline``: count the reference's right answers too, of the
    same run. ``metric``: another measure of both. ``workers``: processes that run the models; the
    figures do not depend on them. ``record``: where the reference's outputs on these images are
    kept for other runs; ``kept``: the model's own, from which, with those, the figures are made
    without running either. Raises ImageError, ModelError, ConfigError.
    """
    tested = Network(model, threads, name=names[0])
    trusted = None if reference is None else Network(reference, threads, name=names[1])
    for network in (tested, trusted):
        if network is not None:
            network.check(images.preprocess.shape)
    classes = _by_name(images, labels)
    if classes is not None and not tested.class_outputs:
        raise ModelError(no_classes(tested))
    shared = _shared_outputs(tested, trusted)
    tallies = Tallies(list(shared), features if classes is None else ())
    counting = None if classes is None else _Counting(tallies, classes, tested)
    own = None
    if baseline and trusted is not None and classes is not None:
        own = _Counting(Tallies(trusted.names), classes, trusted)
    scoring = None if metric is None else Scoring(metric, reference=trusted is not None)
    count = 0
    runs = Runs(tested, trusted, (model, reference), names, threads, workers, record, kept)
    for batch_names, found, floats in runs.over(images, batch_size):
        beside = (
            None if floats is None else {n: floats[o] for n, o in shared.items() if o in floats}
        )
        tallies.add(found, tested.whole, beside, tested.loose)
        if counting is not None:
            counting.add(batch_names, found)
        if scoring is not None:
            scoring.add(batch_names, found, beside)
        if own is not None and floats is not None:
            own.tallies.add(floats, own.network.whole)
            own.add(batch_names, floats)
        count += len(batch_names)
        if progress is not None:
            progress(count, len(images))
    counted = [] if counting is None else counting.counted or []
    result = _evaluation(tallies, counted, count, [tested, trusted], shared)
    return replace(
        result,
        baseline=None if own is None else own.evaluation(count),
        score=None if scoring is None else scoring.score(),
    )


def _shared_outputs(tested: Network, trusted: Network | None) -> dict[str, str]:
    """The outputs that are measured, by name, with the reference's name for each. Raises
    ImageError where the two models have none in common."""
    if trusted is None:
        return {n: n for n in tested.names}
    shared = pairs(tested.names, trusted.names)
    if not shared:
        raise ImageError(
            f"The outputs of the reference model are none of the model's, {tested.described}: they"
            " are not the same network."
        )
    return shared


@dataclass
class _Counting:
    """Counts a network's right answers; which outputs answer is known after the first batch."""

    tallies: Tallies
    classes: Mapping[str, int]
    network: Network
    counted: list[Tally] | None = None

    def add(self, names: Sequence[str], found: Mapping[str, Values]) -> None:
        """Count a batch that ``tallies`` have seen. Raises ImageError, ModelError."""
        if self.counted is None:
            self.counted = _wide_enough(self.tallies.classes, self.classes, self.network)
        known = np.array([name in self.classes for name in names])
        truth = np.array([self.classes.get(name, 0) for name in names], dtype=np.int64)
        for tally in self.counted:
            tally.count(found[tally.name], truth, known)

    def evaluation(self, count: int) -> Evaluation:
        """The network's own accuracy on so many images."""
        same = {n: n for n in self.network.names}
        return _evaluation(self.tallies, self.counted or [], count, [self.network, None], same)


def _evaluation(
    tallies: Tallies,
    counted: Sequence[Tally],
    count: int,
    networks: Sequence[Network | None],
    shared: Mapping[str, str],
) -> Evaluation:
    tested, trusted = networks[0], networks[1]
    assert tested is not None
    outputs = tuple(t.figures(counted=t in counted) for t in tallies.each.values() if t.shape)
    by_name = {one.name: one for one in outputs}
    main = _main([by_name[t.name] for t in (counted or tallies.classes)])
    left = [f"{one}: not a tensor of numbers, left out" for one in tested.left_out]
    left += [f"'{n}': not in the reference model" for n in tested.names if n not in shared]
    left += [
        f"'{t.name}': the two models do not always give it the same size, so it has no figures"
        for t in tallies.each.values()
        if t.ragged
    ]
    left += [f"'{n}': only a filled-up batch produces it" for n in shared if n not in by_name]
    return Evaluation(
        count=count,
        top1=None if main is None else main.top1,
        top5=None if main is None else main.top5,
        sqnr_db=None if trusted is None else tallies.worst,
        agreement=None if main is None else main.agreement,
        outputs=outputs,
        main=None if main is None else main.name,
        left_out=tuple(left),
        whole=tuple(n for n in tested.names if n in tested.whole),
    )


def _main(candidates: Sequence[OutputFigures]) -> OutputFigures | None:
    """The output that answers: with the most right answers, else the first."""
    return max(candidates, key=lambda one: one.top1 or 0.0, default=None)


def _wide_enough(
    tallies: Sequence[Tally], classes: Mapping[str, int], network: Network
) -> list[Tally]:
    """The outputs that have all classes of the labels. Raises ImageError, ModelError."""
    if not tallies:
        raise ModelError(no_classes(network))
    name = max(classes, key=lambda n: classes[n], default="")
    most = classes.get(name, 0)
    found = [tally for tally in tallies if tally.width > most]
    if not found:
        width = max(tally.width for tally in tallies)
        raise ImageError(
            f"Label {most} of image '{name}' is out of range: the model "
            f"has {width} classes, 0…{width - 1}."
        )
    return found


def no_classes(network: Network) -> str:
    """Why labels are of no use to a model."""
    return (
        f"{network.name} has no output [batch, classes] to compare labels with, only"
        f" {network.described}: leave the labels out."
    )


def logits(
    model: Model,
    images: ImageSource,
    *,
    batch_size: int = 8,
    threads: int = 0,
    progress: Progress | None = None,
) -> FloatArray:
    """Logits float32 [N, classes] of all images, in order. Raises ImageError, ModelError."""
    classifier = Classifier(model, threads)
    classifier.check(images.preprocess.shape)
    parts: list[FloatArray] = []
    done = 0
    for batch in images.batches(batch_size):
        parts.append(classifier(batch))
        done += len(batch)
        if progress is not None:
            progress(done, len(images))
    return np.concatenate(parts)


def since(advance: Callable[[int], Any]) -> Progress:
    """From 'done so far, of all' to 'done since'."""
    before = 0

    def tell(done: int, _: int) -> None:
        nonlocal before
        advance(done - before)
        before = done

    return tell


def _by_name(images: ImageSource, labels: NDArray[np.int64] | None) -> dict[str, int] | None:
    """Class by image name: names stay right when an unreadable image drops out on the way."""
    if labels is None:
        return None
    names = images.names
    if len(labels) != len(names):
        raise ImageError(f"There are {len(labels)} labels for {len(names)} images.")
    if len(labels) and labels.min() < 0:
        raise ImageError(f"Label {labels.min()} is negative: classes count from 0.")
    return dict(zip(names, labels.tolist(), strict=True))
