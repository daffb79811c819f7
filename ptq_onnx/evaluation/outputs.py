"""What is measured at each output of a model: closeness to float, and accuracy where it classifies.

Any output of floats has an SQNR and a cosine, one of whole numbers (indices, masks) the share of
values that are equal. Top classes are compared, and counted, only where an output is [batch,
classes] with more than one class.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.errors import ImageError
from ptq_onnx.numerics.dot import dot

Values = NDArray[Any]
MOST_DB = 200.0
"""What JSON, which has no infinity, says where there is no noise at all, or nothing else."""


@dataclass(frozen=True)
class OutputFigures:
    """One output of a model on images, and against the reference model's.

    ``shape``: of what one run gives, its first dimension ``batch`` where it is that. ``sqnr_db``
    (higher is better): 10·log10(Σ fp² / Σ (fp − q)²) over all images, at most ±200; ``cosine``:
    of all values at once; both None for whole numbers, whose ``equal`` is the percentage of equal
    values. ``agreement``, ``top1``, ``top5``: percentages of images with the same top class, and
    with the right one; None where the output is not [batch, classes], or nothing was compared.
    ``not_finite``: values that are NaN or infinite in one of the two models or in both; where
    they are so in the quantized one alone the SQNR is −200.
    """

    name: str
    shape: tuple[int | str, ...]
    sqnr_db: float | None = None
    cosine: float | None = None
    agreement: float | None = None
    top1: float | None = None
    top5: float | None = None
    equal: float | None = None
    not_finite: int = 0


class Tally:
    """Running sums of one output."""

    def __init__(self, name: str, answers: bool = True) -> None:
        """``answers``: where it is [batch, n], n are classes, not features."""
        self.name, self._answers = name, answers
        self.shape: tuple[int | str, ...] = ()
        self.width = 0
        """Classes, where the output is [batch, classes]; else 0."""
        self.ragged = False
        """Whether the two models gave different sizes of what has no fixed one."""
        self.floats = True
        self._signal = self._noise = self._power = self._dot = 0.0
        self._values = self._equal = self._not_finite = self._broken = 0
        self._compared = self._images = self._same = 0
        self._known = self._hits1 = self._hits5 = 0

    def look(self, value: Values, by_image: bool) -> None:
        """Take the shape of one batch."""
        self.shape = ("batch", *value.shape[1:]) if by_image else value.shape
        self.floats = bool(np.issubdtype(value.dtype, np.floating))
        self.width = classes_of(value) if by_image and self._answers else 0

    def compare(self, reference: Values, value: Values) -> None:
        """Fold in a batch of both models. Raises ImageError where the shapes differ."""
        if reference.shape != value.shape:
            raise ImageError(
                f"Output '{self.name}' is {list(reference.shape)} in the reference model,"
                f" {list(value.shape)} in the model: they are not the same network."
            )
        self._compared += 1
        if not self.floats:
            self._equal += int((reference == value).sum())
            self._values += value.size
            return
        f, q = reference.ravel().astype(np.float64), value.ravel().astype(np.float64)
        good = np.isfinite(f) & np.isfinite(q)
        if not good.all():
            self._not_finite += int((~good).sum())
            self._broken += int((np.isfinite(f) & ~good).sum())
            f, q = f[good], q[good]
        self._signal += dot(f, f)
        self._power += dot(q, q)
        self._dot += dot(f, q)
        f -= q
        self._noise += dot(f, f)
        if self.width:
            self._images += len(value)
            self._same += int((top_classes(reference) == top_classes(value)).sum())

    def count(self, value: Values, truth: NDArray[np.int64], known: NDArray[np.bool_]) -> None:
        """Count right answers: ``truth`` int64 [B], of the images that are ``known`` to have one.

        Among equal logits, which quantized models do have, the first class leads.
        """
        best = np.argsort(-value.reshape(len(value), -1), axis=1, kind="stable")[:, :5]
        right = (best == truth[:, None]) & known[:, None]
        self._known += int(known.sum())
        self._hits1 += int(right[:, 0].sum())
        self._hits5 += int(right.sum())

    def figures(self, *, counted: bool = False) -> OutputFigures:
        """What was found; ``counted``: right answers too."""
        closeness: dict[str, Any] = {}
        if self.compared and self.floats:
            closeness = {"sqnr_db": decibels(self.sqnr), "cosine": self._cosine()}
            if self.width:
                closeness["agreement"] = percent(self._same, self._images)
        elif self.compared:
            closeness = {"equal": percent(self._equal, self._values) if self._values else 100.0}
        if counted and self.width and self._known:
            closeness["top1"] = percent(self._hits1, self._known)
            if self.width >= 5:
                closeness["top5"] = percent(self._hits5, self._known)
        return OutputFigures(self.name, self.shape, not_finite=self._not_finite, **closeness)

    @property
    def compared(self) -> bool:
        """Whether any value was compared."""
        return self._compared > 0 and not self.ragged

    @property
    def sqnr(self) -> float:
        """The SQNR in dB, infinite without noise; of whole numbers, of the share that differs."""
        if not self.floats:
            return ratio_db(self._values, self._values - self._equal)
        return -math.inf if self._broken else ratio_db(self._signal, self._noise)

    def _cosine(self) -> float:
        """1 where both are zero throughout, 0 where one is."""
        scale = math.sqrt(self._signal) * math.sqrt(self._power)
        if scale > 0:
            return max(-1.0, min(self._dot / scale, 1.0))
        return 1.0 if self._signal == self._power else 0.0


class Tallies:
    """Running sums of all outputs, which are added batch by batch."""

    def __init__(self, names: Sequence[str], features: Collection[str] = ()) -> None:
        """``features``: outputs in which no class leads."""
        self.each = {name: Tally(name, name not in features) for name in names}

    def add(
        self,
        values: Mapping[str, Values],
        whole: set[str],
        reference: Mapping[str, Values] | None = None,
        loose: set[str] | None = None,
    ) -> None:
        """Fold in one batch of the model and of the reference; ``whole``: outputs whose first
        dimension is not the batch; ``loose``: those whose size may follow the values."""
        for name, tally in self.each.items():
            if name in values:
                value = values[name]
                tally.look(value, name not in whole)
                if reference is None or name not in reference:
                    continue
                sizes = reference[name].shape, value.shape
                if sizes[0] != sizes[1] and name in (loose or ()):
                    tally.ragged = True
                else:
                    tally.compare(reference[name], value)

    @property
    def classes(self) -> list[Tally]:
        """Those that turned out to be [batch, classes]."""
        return [tally for tally in self.each.values() if tally.width]

    @property
    def worst(self) -> float:
        """The lowest SQNR in dB, of the outputs that hold floats where any does; NaN where none
        was compared."""
        return min((t.sqnr for t in self.ranked), default=math.nan)

    @property
    def ranked(self) -> list[Tally]:
        """The outputs that the worst is one of."""
        compared = [tally for tally in self.each.values() if tally.compared]
        return [tally for tally in compared if tally.floats] or compared


def pairs(names: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """Which output of another file is which: by name, else, as many being left, by position."""
    same = {name: name for name in names if name in others}
    mine = [name for name in names if name not in same]
    rest = [name for name in others if name not in same]
    return same | (dict(zip(mine, rest, strict=True)) if len(mine) == len(rest) else {})


def top_classes(value: Values) -> NDArray[np.int64]:
    """The top class of each row of [B, classes]; of equals the first."""
    return np.asarray(value.reshape(len(value), -1).argmax(axis=1))


def classes_of(value: Values) -> int:
    """The number of classes of an output [B, classes] (ones may follow); 0 where it is none."""
    if value.ndim < 2 or not np.issubdtype(value.dtype, np.floating):
        return 0
    width = int(value.shape[1])
    return width if width > 1 and value[:1].size == width else 0


def percent(part: int, whole: int) -> float:
    """A share in percent; NaN of nothing."""
    return 100.0 * part / whole if whole else math.nan


def decibels(value: float | None) -> float | None:
    """An SQNR for JSON, which has no infinity."""
    return value if value is None or math.isnan(value) else max(-MOST_DB, min(value, MOST_DB))


def ratio_db(signal: float, noise: float) -> float:
    """10·log10 of a ratio of powers; infinite without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def named(figures: Sequence[OutputFigures], one: OutputFigures) -> str:
    """`` of 'boxes'``; nothing where there is one output only."""
    return f" of '{one.name}'" if len(figures) > 1 else ""


def notes_on(figures: Sequence[OutputFigures]) -> list[str]:
    """What must be said of the outputs besides their figures."""
    return [
        f"Output '{one.name}': {one.not_finite} values are NaN or infinite in the float model or in"
        " the quantized one; its figures leave them out."
        for one in figures
        if one.not_finite
    ]
