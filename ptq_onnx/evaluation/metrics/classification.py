"""The top class: against labels, or against the float model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.errors import ImageError
from ptq_onnx.evaluation.metrics.metric import Metric, Outputs, Running, by_image
from ptq_onnx.evaluation.outputs import classes_of, percent


@dataclass
class Classification(Metric):
    """Top-1 and top-5 of an output [batch, classes]."""

    name: ClassVar[str] = "classification"
    figure: ClassVar[str] = "top-1"
    takes: ClassVar[dict[str, str]] = {"output": "the logits [batch, classes]"}

    def begin(self) -> Running:
        """Hits at nothing."""
        return _Hits(self)

    def logits(self, names: Sequence[str], outputs: Outputs) -> NDArray[np.float32]:
        """[B, classes]."""
        fits = {name: classes_of(value) > 1 for name, value in outputs.items()}
        found = by_image(self, names, self.output(outputs, "output", fits, "[batch, classes]"))
        return np.asarray(found, np.float32).reshape(len(names), -1)

    def truth(self, names: Sequence[str], reference: Outputs | None) -> NDArray[np.int64]:
        """The right classes [B]."""
        if self.targets is not None:
            return np.array([self.targets.label(name) for name in names], np.int64)
        assert reference is not None
        return np.asarray(self.logits(names, reference).argmax(axis=1), np.int64)


class _Hits(Running):
    """Right answers, counted."""

    def __init__(self, metric: Classification) -> None:
        self.metric, self.hits, self.five, self.width = metric, 0, 0, 0

    def add(self, names: Sequence[str], outputs: Outputs, reference: Outputs | None) -> None:
        """Count a batch."""
        logits, truth = self.metric.logits(names, outputs), self.metric.truth(names, reference)
        self.width = logits.shape[1]
        if truth.max(initial=0) >= self.width:
            raise ImageError(
                f"--targets: class {truth.max()} is out of range, the model has {self.width}."
            )
        best = np.argsort(-logits, axis=1, kind="stable")[:, :5] == truth[:, None]
        self.count += len(names)
        self.hits += int(best[:, 0].sum())
        self.five += int(best.sum())

    def figures(self) -> dict[str, float]:
        """Percentages."""
        found = {"top-1": percent(self.hits, self.count)}
        return found | ({"top-5": percent(self.five, self.count)} if self.width >= 5 else {})
