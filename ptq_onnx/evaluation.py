"""How good a model is: accuracy on labelled images, and closeness to a reference model."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.errors import ImageError
from ptq_onnx.image_source import ImageSource
from ptq_onnx.preprocess import FloatArray
from ptq_onnx.runtime import Classifier, Model, cuda_works, session

__all__ = ["Evaluation", "Progress", "cuda_works", "evaluate", "logits", "session"]

Progress = Callable[[int, int], Any]
"""Called with (images done, images in all)."""


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measures; None where there is nothing to measure it against.

    ``top1``, ``top5`` (None below 5 classes) and ``agreement`` are percentages, ``sqnr_db`` is in
    dB (higher is better), ``count`` is the number of images.
    """

    count: int
    top1: float | None = None
    top5: float | None = None
    sqnr_db: float | None = None
    agreement: float | None = None


def evaluate(
    model: Model,
    images: ImageSource,
    labels: NDArray[np.int64] | None = None,
    *,
    batch_size: int = 8,
    threads: int = 0,
    reference: Model | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run a model, and a reference beside it, in ONNX Runtime with its default optimizations.

    ``labels`` int64 [N] belong to ``images.names``. Against ``reference``: SQNR of the logits,
    10·log10(Σ fp² / Σ (fp − q)²) with the sums over all images and classes, and the share of images
    with the same top class. Raises ImageError, ModelError.
    """
    tested = Classifier(model, threads)
    trusted = None if reference is None else Classifier(reference, threads)
    for classifier in (tested, trusted):
        if classifier is not None:
            classifier.check(images.preprocess.shape)
    classes = _by_name(images, labels)
    count = labelled = hits1 = hits5 = same = 0
    signal = noise = 0.0
    width = 0
    for names, batch in images.named_batches(batch_size):
        q = tested(batch)
        width = q.shape[1]
        # Stable: among equal logits, which quantized models do have, the first class leads
        best = np.argsort(-q, axis=1, kind="stable")[:, :5]
        if classes is not None:
            known = np.array([name in classes for name in names])
            truth = np.array([classes.get(name, 0) for name in names], dtype=np.int64)
            if (truth >= width).any():
                worst = int(truth.argmax())
                raise ImageError(
                    f"Label {truth[worst]} of image '{names[worst]}' is out of range: the model "
                    f"has {width} classes, 0…{width - 1}."
                )
            right = (best == truth[:, None]) & known[:, None]
            labelled += int(known.sum())
            hits1 += int(right[:, 0].sum())
            hits5 += int(right.sum())
        if trusted is not None:
            fp = trusted(batch)
            if fp.shape != q.shape:
                raise ImageError(
                    f"The reference model gives {fp.shape[1]} logits an image, the model {width}: "
                    "they are not the same network."
                )
            signal += float(np.square(fp, dtype=np.float64).sum())
            noise += float(np.square(fp.astype(np.float64) - q).sum())
            same += int((fp.argmax(axis=1) == q.argmax(axis=1)).sum())
        count += len(batch)
        if progress is not None:
            progress(count, len(images))
    return Evaluation(
        count=count,
        top1=_percent(hits1, labelled) if classes is not None else None,
        top5=_percent(hits5, labelled) if classes is not None and width >= 5 else None,
        sqnr_db=_sqnr_db(signal, noise) if trusted is not None else None,
        agreement=_percent(same, count) if trusted is not None else None,
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


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else math.nan


def _sqnr_db(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
