"""Features as they are searched with: queries of the quantized model in the float gallery.

What DINOv2, CLIP and face models are used for. The gallery holds the float features, the queries
are the quantized ones, and both are what this metric holds: 8 bytes for each number of each image,
``LARGEST`` at most. Similarity is the cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.evaluation.metrics.metric import Metric, Outputs, Running, by_image
from ptq_onnx.evaluation.outputs import percent

Array = NDArray[np.float32]
LARGEST = 1 << 30
"""Bytes of gallery and queries."""
ROWS = 256
"""Queries that are compared at once."""
NEIGHBOURS = 5


@dataclass
class Features(Metric):
    """Recall@1, and how many of the k nearest neighbours stay; with classes as targets also how
    often the majority of them is right."""

    name: ClassVar[str] = "features"
    figure: ClassVar[str] = "recall@1"
    takes: ClassVar[dict[str, str]] = {
        "output": "the features [batch, D], or [batch, tokens, D]: then of the first token",
        "k": f"nearest neighbours that are compared ({NEIGHBOURS})",
    }

    def begin(self) -> Running:
        """An empty gallery."""
        return _Gallery(self, self.whole("k", NEIGHBOURS))

    def vectors(self, names: Sequence[str], outputs: Outputs) -> Array:
        """Unit vectors [B, D]."""
        fits = {
            n: v.ndim >= 2 and v.dtype.kind == "f" and v.size > len(v) for n, v in outputs.items()
        }
        flat = {n: good and outputs[n].ndim == 2 for n, good in fits.items()}
        what = "[batch, D] or [batch, tokens, D]"
        found = self.output(outputs, "output", flat if any(flat.values()) else fits, what)
        found = by_image(self, names, found)
        if found.ndim == 3:
            self.guess("the features are the first token's")
            found = found[:, 0]
        rows = np.asarray(found, np.float32).reshape(len(names), -1)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.asarray(rows / np.where(length > 0, length, 1), np.float32)


class _Gallery(Running):
    """The float features and the quantized ones, image by image."""

    def __init__(self, metric: Features, neighbours: int) -> None:
        if neighbours < 1:
            raise ConfigError("--metric-option k: at least 1 neighbour is compared.")
        self.metric, self.k, self._bytes = metric, neighbours, 0
        self._queries: list[Array] = []
        self._floats: list[Array] = []
        self._classes: list[int] = []

    def add(self, names: Sequence[str], outputs: Outputs, reference: Outputs | None) -> None:
        """Keep a batch of both."""
        queries = self.metric.vectors(names, outputs)
        floats = queries if reference is None else self.metric.vectors(names, reference)
        self._bytes += queries.nbytes + floats.nbytes
        if self._bytes > LARGEST:
            raise ImageError(
                f"--metric features holds the features of all images, {LARGEST >> 20} MB at most:"
                f" {self.count} images fill that; measure on fewer."
            )
        self._queries.append(queries)
        self._floats.append(floats)
        if self.metric.targets is not None:
            self._classes += [self.metric.targets.label(name) for name in names]
        self.count += len(names)

    def figures(self) -> dict[str, float]:
        """Percentages, and the mean cosine of an image's two features."""
        queries, gallery = np.concatenate(self._queries), np.concatenate(self._floats)
        k, classes = min(self.k, self.count - 1), np.array(self._classes, np.int64)
        found = same = right = 0
        for start in range(0, self.count, ROWS):
            rows = np.arange(start, min(start + ROWS, self.count))
            mine = queries[rows] @ gallery.T
            theirs = gallery[rows] @ gallery.T
            found += int((mine[np.arange(len(rows)), rows] >= mine.max(axis=1)).sum())
            if k < 1:
                continue
            near, true = (_nearest(values, rows, k) for values in (mine, theirs))
            same += int((near[:, :, None] == true[:, None, :]).sum())
            if len(classes):
                right += int((_majority(classes[near]) == classes[rows]).sum())
        result = {
            "recall@1": percent(found, self.count),
            "cosine": float(np.mean(np.sum(queries * gallery, axis=1))),
        }
        if k >= 1:
            result[f"same {k} neighbours"] = percent(same, k * self.count)
            if len(classes):
                result[f"{k}-NN top-1"] = percent(right, self.count)
        return result


def _nearest(similar: Array, own: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Indices [B, k] of the most similar [B, N] but the image itself."""
    others = similar.copy()
    others[np.arange(len(own)), own] = -np.inf
    return np.asarray(np.argpartition(-others, k - 1, axis=1)[:, :k])


def _majority(votes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The most frequent of each row [B, k]; of equals the smallest."""
    counts = (votes[:, :, None] == votes[:, None, :]).sum(axis=2)
    ranked = np.where(counts == counts.max(axis=1, keepdims=True), votes, np.iinfo(np.int64).max)
    return np.asarray(ranked.min(axis=1))
