"""Boxes: COCO's mean average precision, by faster-coco-eval or pycocotools.

Boxes are compared at the size of the model's input, where the annotations are brought as the
picture was: overlaps are the same there, but what a crop cuts off is gone, and small, medium and
large are those of the input. Average precision ranks the boxes of all images, so that these are
held: 24 bytes each, ``MOST_BOXES`` of an image at most.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.evaluation.metrics.metric import Metric, Outputs, Running, Values
from ptq_onnx.images.preprocess import placed

Array = NDArray[np.float32]
SIDES = 4, 5
"""What the last axis of boxes may have: their sides, and the score behind them."""
MOST_BOXES = 100
"""Of an image, the surest: what COCO counts."""
SURE = 0.5
"""Score from which on a float model's box is a truth."""
LIBRARIES = (
    ("faster_coco_eval", "faster_coco_eval", "COCO", "COCOeval_faster"),
    ("pycocotools", "pycocotools.coco", "COCO", "COCOeval"),
)
FIGURES = {"mAP": 0, "mAP@50": 1, "mAP@75": 2}
"""Places in what the libraries summarise."""


@dataclass(frozen=True, eq=False)
class Boxes:
    """Of one image: ``corners`` [N, 4] (left, top, right, bottom) in pixels of the input, scores
    and classes [N]; ``crowd``: those that stand for many."""

    corners: Array
    scores: Array
    classes: NDArray[np.int64]
    crowd: NDArray[np.bool_]


@dataclass
class Detection(Metric):
    """mAP over the overlaps 0.50 to 0.95."""

    name: ClassVar[str] = "detection"
    figure: ClassVar[str] = "mAP"
    takes: ClassVar[dict[str, str]] = {
        "boxes": "the boxes [batch, N, 4], or [batch, N, 5] with the score behind",
        "scores": "the scores [batch, N], or class logits [batch, N, classes]",
        "labels": "the classes [batch, N], where the scores are not by class",
        "form": "cxcywh (centre and size), xyxy (corners) or xywh (corner and size)",
        "units": "relative (0 to 1) or pixels (of the input); by default as the values look",
        "activation": "of class logits: softmax (the last class is none), sigmoid or none",
        "classes": "ids: the model's numbers are COCO's category ids; order: places in their list",
        "sure": f"as float: the score from which on a box counts as truth ({SURE})",
    }

    input_size: tuple[int, int] = (1, 1)
    """Height and width of the model's input."""
    _looked: bool | None = None
    _own: str = ""
    """The output that holds the boxes."""

    def begin(self) -> Running:
        """No boxes."""
        library()
        return _Kept(self)

    def found(self, names: Sequence[str], outputs: Outputs) -> list[Boxes]:
        """The surest boxes of each image."""
        rows = self._boxes(names, outputs)
        scores, classes = self._scores(names, outputs, rows)
        rows = rows[..., :4]
        form = self.options.get("form")
        if form is None:
            form = "cxcywh" if self._relative(rows) else "xyxy"
            self.guess(f"form={form}")
        self.word("form", ("cxcywh", "xyxy", "xywh"))
        corners = _corners(rows, form)
        if self._relative(rows):
            height, width = self.input_size
            corners = corners * np.array([width, height, width, height], np.float32)
        return [_surest(c, s, k) for c, s, k in zip(corners, scores, classes, strict=True)]

    def truth(self, names: Sequence[str], reference: Outputs | None) -> list[Boxes]:
        """The boxes that are there."""
        if self.targets is not None:
            return [self._annotated(name) for name in names]
        assert reference is not None
        limit = self.number("sure", SURE)
        return [
            Boxes(b.corners[s], b.scores[s], b.classes[s], b.crowd[s])
            for b in self.found(names, reference)
            for s in [b.scores >= limit]
        ]

    def _annotated(self, name: str) -> Boxes:
        assert self.targets is not None
        try:
            width, height, left, top = placed(*self.targets.size(name), self.targets.preprocess)
        except ValueError as error:
            raise ImageError(f"Image '{name}': {error}.") from None
        own = annotated(self.targets.boxes(name))
        before = self.targets.size(name)
        scale = np.array([width / before[0], height / before[1]] * 2, np.float32)
        corners = own.corners * scale - np.array([left, top, left, top], np.float32)
        down, across = self.input_size
        cut = np.clip(corners, 0, np.array([across, down, across, down], np.float32))
        there = ((cut[:, 2] - cut[:, 0]) > 1) & ((cut[:, 3] - cut[:, 1]) > 1)
        return Boxes(cut[there], own.scores[there], own.classes[there], own.crowd[there])

    def _boxes(self, names: Sequence[str], outputs: Outputs) -> Array:
        for sides in SIDES:
            fits = {n: v.dtype.kind == "f" and v.shape[-1:] == (sides,) for n, v in outputs.items()}
            if any(fits.values()):
                break
        named = {n: good and "box" in n.lower() for n, good in fits.items()}
        fits = named if any(named.values()) else fits  # four classes have the same shape
        found = self.output(outputs, "boxes", fits, "boxes [batch, N, 4]")
        if found.shape[-1:] not in [(s,) for s in SIDES]:
            raise ConfigError(
                f"--metric-option boxes={self.options['boxes'][:60]}: the output is"
                f" {list(found.shape)}; expected [batch, N, 4], or 5 with the score behind."
            )
        self._own = next(n for n, v in outputs.items() if v is found)
        return np.asarray(_of_images(found, names, 3), np.float32)

    def _relative(self, rows: Array) -> bool:
        """Whether boxes are parts of the input, by the option or by how the first ones look."""
        units = self.options.get("units")
        if units is not None:
            return self.word("units", ("relative", "pixels")) == "relative"
        if self._looked is None:
            largest = np.abs(rows).max(initial=0)
            if largest == 0:  # no box, or rows filled up with nothing: the next batch will tell
                return False
            self._looked = bool(largest <= 2)
            self.guess(f"units={'relative' if self._looked else 'pixels'}")
        return self._looked

    def _scores(
        self, names: Sequence[str], outputs: Outputs, rows: Array
    ) -> tuple[Array, NDArray[np.int64]]:
        """Scores and classes [B, N]."""
        count = rows.shape[1]
        if rows.shape[2] == 5 and "scores" not in self.options:
            return rows[..., 4], self._labels(names, outputs, count)
        fits = {
            n: v.dtype.kind == "f" and n != self._own and count in v.shape[-2:]
            for n, v in outputs.items()
        }
        found = self.output(outputs, "scores", fits, f"scores of {count} boxes")
        if found.ndim == 3 or (found.ndim == 2 and len(names) == 1 and len(found) == count > 1):
            values = np.asarray(_of_images(found, names, 3), np.float32)
            activation = self.word("activation", ("softmax", "sigmoid", "none"))
            if "activation" not in self.options:
                self.guess("activation=softmax, the last class being none")
            if activation == "softmax":
                values = np.exp(values - values.max(axis=-1, keepdims=True))
                values = (values / values.sum(axis=-1, keepdims=True))[..., :-1]
            elif activation == "sigmoid":
                values = np.asarray(1 / (1 + np.exp(-values)), np.float32)
            return values.max(axis=-1), self._numbered(values.argmax(axis=-1))
        scores = np.asarray(_of_images(found, names, 2), np.float32)
        return scores, self._labels(names, outputs, count)

    def _labels(self, names: Sequence[str], outputs: Outputs, count: int) -> NDArray[np.int64]:
        """Classes [B, N]."""
        fits = {n: v.dtype.kind in "iu" and v.shape[-1:] == (count,) for n, v in outputs.items()}
        classes = self.output(outputs, "labels", fits, f"classes of {count} boxes")
        return self._numbered(_of_images(classes, names, 2))

    def _numbered(self, classes: Values) -> NDArray[np.int64]:
        """COCO's category ids."""
        classes = np.asarray(classes, np.int64)
        if self.word("classes", ("ids", "order")) == "ids" or self.targets is None:
            return classes
        known = np.array(self.targets.categories, np.int64)
        beyond = classes >= len(known)
        return np.where(beyond, -1, known[np.where(beyond, 0, classes)])


class _Kept(Running):
    """Boxes of all images."""

    def __init__(self, metric: Detection) -> None:
        self.metric = metric
        self._truth: list[Boxes] = []
        self._found: list[Boxes] = []

    def add(self, names: Sequence[str], outputs: Outputs, reference: Outputs | None) -> None:
        """Keep the surest boxes of a batch, and those that are there."""
        self._found += self.metric.found(names, outputs)
        self._truth += self.metric.truth(names, reference)
        self.count += len(names)

    def figures(self) -> dict[str, float]:
        """Percentages. Raises ImageError where no image has a box."""
        return average_precision(self._truth, self._found)


def annotated(entries: Sequence[Mapping[str, Any]]) -> Boxes:
    """COCO's annotations of a picture, in its own pixels."""
    rows = np.array([e["bbox"] for e in entries], np.float32).reshape(-1, 4)
    classes = np.array([e["category_id"] for e in entries], np.int64)
    crowd = np.array([e["iscrowd"] for e in entries], bool)
    return Boxes(_corners(rows, "xywh"), np.ones(len(rows), np.float32), classes, crowd)


def average_precision(truth: Sequence[Boxes], found: Sequence[Boxes]) -> dict[str, float]:
    """COCO's figures in percent, image by image."""
    entries = [
        {**box, "id": number + 1, "image_id": index + 1, "iscrowd": int(crowd)}
        for index, one in enumerate(truth)
        for number, (box, crowd) in enumerate(zip(_entries(one), one.crowd, strict=True))
    ]
    for number, entry in enumerate(entries):
        entry["id"] = number + 1
    results = [
        {**box, "image_id": index + 1, "score": float(s)}
        for index, one in enumerate(found)
        for box, s in zip(_entries(one), one.scores, strict=True)
    ]
    boxes = {"boxes there": float(len(entries))}
    if not entries:
        raise ImageError(
            "--metric detection: there is no box to find on these images; give targets that have"
            " some, or as float a lower score with --metric-option sure=0.3."
        )
    if not results:
        return dict.fromkeys(FIGURES, 0.0) | boxes
    categories = sorted({e["category_id"] for e in [*entries, *results]})
    dataset = {
        "info": {},
        "images": [{"id": index + 1} for index in range(len(truth))],
        "categories": [{"id": c, "name": str(c)} for c in categories],
        "annotations": entries,
    }
    opened, judged = library()
    with contextlib.redirect_stdout(io.StringIO()):
        known = opened()
        known.dataset = dataset
        known.createIndex()
        run = judged(known, known.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: 100.0 * max(float(run.stats[at]), 0.0) for name, at in FIGURES.items()} | boxes


def library() -> tuple[Any, Any]:
    """COCO's classes, of whichever library is there. Raises ConfigError."""
    for name, module, known, judge in LIBRARIES:
        try:
            first = importlib.import_module(module)
            second = first if module == name else importlib.import_module(f"{name}.cocoeval")
        except ImportError:
            continue
        return getattr(first, known), getattr(second, judge)
    raise ConfigError(
        "--metric detection needs COCO's evaluation: pip install ptq-onnx[detection], which is"
        " faster-coco-eval (pycocotools will do)."
    )


def _entries(one: Boxes) -> list[dict[str, Any]]:
    size = one.corners[:, 2:] - one.corners[:, :2]
    boxes = np.concatenate([one.corners[:, :2], size], axis=1).astype(float).tolist()
    return [
        {"bbox": box, "area": box[2] * box[3], "category_id": int(kind)}
        for box, kind in zip(boxes, one.classes, strict=True)
    ]


def _of_images(value: Values, names: Sequence[str], rank: int) -> Values:
    """[B, …], also of one image without that axis. Raises ImageError."""
    if value.ndim == rank - 1 and len(names) == 1:
        value = value[None]
    if value.ndim != rank or len(value) != len(names):
        raise ImageError(
            f"--metric detection: an output {list(value.shape)} of {len(names)} images is not one"
            " for each: use --batch 1."
        )
    return value


def _corners(rows: Array, form: str) -> Array:
    """Left, top, right, bottom [..., 4]."""
    first, second = rows[..., :2], rows[..., 2:]
    if form == "cxcywh":
        return np.concatenate([first - second / 2, first + second / 2], axis=-1)
    return rows if form == "xyxy" else np.concatenate([first, first + second], axis=-1)


def _surest(corners: Array, scores: Array, classes: NDArray[np.int64]) -> Boxes:
    order = np.argsort(-scores, kind="stable")[:MOST_BOXES]
    order = order[(classes[order] >= 0) & np.isfinite(corners[order]).all(axis=1)]
    none = np.zeros(len(order), bool)
    return Boxes(corners[order], scores[order], classes[order], none)
