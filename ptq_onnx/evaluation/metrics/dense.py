"""A number or a class at every place of the picture: segmentation and depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.errors import ImageError
from ptq_onnx.evaluation.metrics.metric import Metric, Outputs, Running, Values, by_image
from ptq_onnx.evaluation.outputs import percent

Double = NDArray[np.float64]
MOST_CLASSES = 4096
VOID = 255
"""The class that usually means: not labelled."""
CLOSE = 1.25
"""δ1 counts what is within this ratio of the truth (Eigen et al., arXiv 1406.2283)."""


@dataclass
class Segmentation(Metric):
    """mIoU: the mean over the classes that occur of hits / (hits + misses + false alarms), each
    counted over all images."""

    name: ClassVar[str] = "segmentation"
    figure: ClassVar[str] = "mIoU"
    takes: ClassVar[dict[str, str]] = {
        "output": "logits [batch, classes, H, W], one map [batch, 1, H, W], or classes [batch, H,"
        " W]",
        "threshold": "of one map: from which value on it is the object (0.5)",
        "ignore": f"class of the targets that does not count ({VOID})",
        "shift": "is added to the classes of the targets (0; -1 where 0 is no class)",
    }

    def begin(self) -> Running:
        """An empty table of classes."""
        return _Confusion(self)

    def maps(self, names: Sequence[str], outputs: Outputs, size: Sequence[int] | None) -> Values:
        """Classes [B, H, W]; logits are resized to ``size`` before they are compared."""
        fits = {
            n: v.ndim == 4 or (v.ndim == 3 and v.dtype.kind in "iu") for n, v in outputs.items()
        }
        what = "[batch, classes, H, W] or whole numbers [batch, H, W]"
        found = by_image(self, names, self.output(outputs, "output", fits, what))
        if found.dtype.kind in "iu":
            found = found.reshape(len(found), *found.shape[-2:])
            return found if size is None else nearest(found, size)
        if found.ndim == 3:
            found = found[:, None]
        if size is not None and tuple(size) != found.shape[-2:]:
            found = bilinear(np.asarray(found, np.float32), size)
        if found.shape[1] == 1:
            limit = self.number("threshold", 0.5)
            if "threshold" not in self.options:
                self.guess("the map's threshold is 0.5")
            return np.asarray(found[:, 0] > limit, np.int64)
        return np.asarray(found.argmax(axis=1), np.int64)

    def truth(self, names: Sequence[str], reference: Outputs | None) -> list[Values]:
        """The right classes of each image [H, W]."""
        if self.targets is None:
            assert reference is not None
            return list(self.maps(names, reference, None))
        found = [np.asarray(self.targets.array(name)) for name in names]
        for name, one in zip(names, found, strict=True):
            if one.ndim != 2:
                raise ImageError(
                    f"--targets: expected classes [H, W] for '{name}', got {list(one.shape)}: a"
                    " picture of class numbers, not of colours."
                )
        shift, void = self.options.get("shift"), self.whole("ignore", VOID)
        by = 0 if shift is None else int(self.number("shift", 0))
        return [np.where(one == void, -1, one.astype(np.int64) + by) for one in found]


class _Confusion(Running):
    """How often class i was called class j."""

    def __init__(self, metric: Segmentation) -> None:
        self.metric, self.table = metric, np.zeros((0, 0), np.int64)

    def add(self, names: Sequence[str], outputs: Outputs, reference: Outputs | None) -> None:
        """Count the places of a batch."""
        truth = self.metric.truth(names, reference)
        together = len({one.shape for one in truth}) == 1
        sizes = truth[0].shape if self.metric.targets is not None and together else None
        if self.metric.targets is not None and not together:
            for index, name in enumerate(names):
                own = {k: v[index : index + 1] for k, v in outputs.items()}
                self._count(truth[index], self.metric.maps([name], own, truth[index].shape)[0])
        else:
            found = self.metric.maps(names, outputs, sizes)
            for one, other in zip(truth, found, strict=True):
                self._count(one, other)
        self.count += len(names)

    def _count(self, truth: Values, found: Values) -> None:
        if truth.shape != found.shape:
            raise ImageError(
                f"--metric segmentation: a map {list(found.shape)} against {list(truth.shape)}."
            )
        counts = truth >= 0
        right, called = truth[counts], found[counts]
        width = max(len(self.table), int(max(right.max(initial=0), called.max(initial=0))) + 1)
        if width > MOST_CLASSES:
            raise ImageError(
                f"--metric segmentation: class {width - 1} is beyond the {MOST_CLASSES} that are"
                " counted: is the target a picture of class numbers?"
            )
        if width > len(self.table):
            grown = np.zeros((width, width), np.int64)
            grown[: len(self.table), : len(self.table)] = self.table
            self.table = grown
        pairs = np.bincount(right * width + called, minlength=width * width)
        self.table += pairs.reshape(width, width)

    def figures(self) -> dict[str, float]:
        """Percentages, over the classes that occur in truth or answer."""
        hits = np.diag(self.table).astype(np.float64)
        union = self.table.sum(axis=0) + self.table.sum(axis=1) - hits
        occurs = union > 0
        if not occurs.any():
            raise ImageError("--metric segmentation: no place of the targets has a class.")
        return {
            "mIoU": 100.0 * float(np.mean(hits[occurs] / union[occurs])),
            "pixels right": percent(int(hits.sum()), int(self.table.sum())),
            "classes": float(occurs.sum()),
        }


@dataclass
class Depth(Metric):
    """AbsRel, the mean of |d − t| / t, and δ1, the share of places with max(d / t, t / d) < 1.25:
    each over all places of all images whose truth is positive."""

    name: ClassVar[str] = "depth"
    figure: ClassVar[str] = "AbsRel"
    unit: ClassVar[str] = ""
    higher: ClassVar[bool] = False
    perfect: ClassVar[float | None] = 0.0
    takes: ClassVar[dict[str, str]] = {
        "output": "the depths [batch, H, W] or [batch, 1, H, W]",
        "align": "none, median (one factor for each image) or affine (factor and offset, by least"
        " squares), where the model's depth has no scale",
        "scale": "by which the targets are divided (1; 1000 for millimetres)",
    }

    def begin(self) -> Running:
        """Sums at nothing."""
        return _Ratios(self)

    def depths(self, names: Sequence[str], outputs: Outputs) -> Values:
        """[B, H, W]."""
        fits = {
            n: v.dtype.kind == "f" and (v.ndim == 3 or (v.ndim == 4 and v.shape[1] == 1))
            for n, v in outputs.items()
        }
        found = self.output(outputs, "output", fits, "[batch, H, W] or [batch, 1, H, W]")
        return by_image(self, names, found).reshape(len(names), *found.shape[-2:])


class _Ratios(Running):
    """Sums over places."""

    def __init__(self, metric: Depth) -> None:
        self.metric, self.off, self.close, self.places = metric, 0.0, 0, 0
        self.align = metric.word("align", ("none", "median", "affine"))
        self.scale = metric.number("scale", 1.0)

    def add(self, names: Sequence[str], outputs: Outputs, reference: Outputs | None) -> None:
        """Add the places of a batch."""
        found = np.asarray(self.metric.depths(names, outputs), np.float32)
        plain = None if reference is None else self.metric.depths(names, reference)
        targets = self.metric.targets
        for index, name in enumerate(names):
            if targets is None:
                assert plain is not None
                truth = np.asarray(plain[index], np.float64)
            else:
                truth = np.squeeze(targets.array(name)).astype(np.float64) / self.scale
            if truth.ndim != 2:
                raise ImageError(f"--targets: expected depths [H, W] for '{name}'.")
            self._add(bilinear(found[None, index : index + 1], truth.shape)[0, 0], truth)
        self.count += len(names)

    def _add(self, found: Values, truth: Double) -> None:
        good = np.isfinite(truth) & (truth > 0) & np.isfinite(found)
        t, d = truth[good], self._aligned(found[good].astype(np.float64), truth[good])
        self.off += float(np.sum(np.abs(d - t) / t))
        self.places += t.size
        self.close += int(np.sum((d > 0) & (d < CLOSE * t) & (t < CLOSE * d)))

    def _aligned(self, found: Double, truth: Double) -> Double:
        if self.align == "none" or not found.size:
            return found
        if self.align == "median":
            middle = float(np.median(found))
            return found * (float(np.median(truth)) / middle) if middle else found
        columns = np.stack([found, np.ones_like(found)], axis=1)
        by: Any = np.linalg.lstsq(columns, truth, rcond=None)[0]
        return np.asarray(columns @ by)

    def figures(self) -> dict[str, float]:
        """AbsRel as it is, δ1 in percent."""
        if not self.places:
            raise ImageError("--metric depth: no place of the targets has a positive depth.")
        return {"AbsRel": self.off / self.places, "δ1": percent(self.close, self.places)}


def bilinear(values: NDArray[np.float32], size: Sequence[int]) -> NDArray[np.float32]:
    """[B, C, H, W] at another size, between the centres of places, as networks upsample."""
    if values.shape[-2:] == tuple(size):
        return values
    down, across = (
        _weights(have, want) for have, want in zip(values.shape[-2:], size, strict=True)
    )
    return np.asarray(down @ values @ across.T, np.float32)


def nearest(values: Values, size: Sequence[int]) -> Values:
    """[B, H, W] at another size, none of its numbers mixed."""
    rows, columns = (
        (np.arange(want) + 0.5) * have / want
        for have, want in zip(values.shape[-2:], size, strict=True)
    )
    return values[:, rows.astype(np.int64)][:, :, columns.astype(np.int64)]


def _weights(have: int, want: int) -> NDArray[np.float32]:
    """[want, have]: what each place takes of the two beside it."""
    at = np.clip((np.arange(want) + 0.5) * have / want - 0.5, 0, have - 1)
    low = np.floor(at).astype(np.int64)
    found = np.zeros((want, have), np.float32)
    rows = np.arange(want)
    found[rows, low] = 1 - (at - low)
    found[rows, np.minimum(low + 1, have - 1)] += (at - low).astype(np.float32)
    return found
