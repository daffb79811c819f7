"""What every metric is: answers of a model, and the truth that they are held against.

The truth comes from files (``targets.py``); without any, the float model's own answers are it, "as
float". Sums are of a fixed size wherever the formula allows: each file says what it holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.evaluation.metrics.targets import Targets

Values = NDArray[Any]
Outputs = Mapping[str, Values]
AS_FLOAT = "as float"
"""What stands for targets where there are none."""


@dataclass(frozen=True)
class Score:
    """A metric of the quantized model, and of the float one, on the same images.

    ``metric``: its option; ``figure``: what ``value`` is, in ``unit`` (``%``, or nothing for a
    plain number); ``higher``: higher is better. ``targets``: where the truth is from, ``as float``
    where the float model's answers are it. ``float_value``: of the float model; what equals it has
    without targets; None where no reference was given. ``figures``: all, by name. ``guessed``: what
    was not said and was taken so.
    """

    metric: str
    figure: str
    unit: str
    higher: bool
    targets: str
    images: int
    value: float
    float_value: float | None
    figures: dict[str, float]
    float_figures: dict[str, float]
    guessed: tuple[str, ...] = ()

    @property
    def lost(self) -> float | None:
        """How much worse than float, in the unit; negative: better."""
        if self.float_value is None:
            return None
        gap = self.float_value - self.value
        return gap if self.higher else -gap


class Running(ABC):
    """The sums of one model over batches."""

    count: int = 0

    @abstractmethod
    def add(self, names: Sequence[str], outputs: Outputs, reference: Outputs | None) -> None:
        """Fold in a batch: its images' names, the model's outputs [B, …], the float model's by the
        same names. Raises ImageError."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """Every figure by its name."""


@dataclass
class Metric(ABC):
    """One of the tasks, with its options and its truth.

    ``options``: of the metric, by key; ``targets`` None: as float.
    """

    name: ClassVar[str]
    figure: ClassVar[str]
    unit: ClassVar[str] = "%"
    higher: ClassVar[bool] = True
    perfect: ClassVar[float | None] = 100.0
    """What the float model has as float; None where that has to be computed."""
    takes: ClassVar[Mapping[str, str]] = {}
    """Its options, with what they mean."""

    options: Mapping[str, str]
    targets: Targets | None = None
    guessed: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ConfigError for options that make no sense."""
        unknown = next((key for key in self.options if key not in self.takes), None)
        if unknown is not None:
            known = ", ".join(self.takes) or "none"
            raise ConfigError(
                f"--metric-option {unknown}: --metric {self.name} has no such option; it takes"
                f" {known}."
            )

    @abstractmethod
    def begin(self) -> Running:
        """Sums at nothing."""

    def guess(self, text: str) -> None:
        """Note something that was not said."""
        self.guessed.setdefault(text)

    def word(self, key: str, choices: Sequence[str]) -> str:
        """An option that is one of some words; the first where it was not given."""
        found = self.options.get(key, choices[0])
        if found not in choices:
            raise ConfigError(
                f"--metric-option {key}={found[:40]}: expected one of {', '.join(choices)}."
            )
        return found

    def number(self, key: str, default: float) -> float:
        """An option that is a finite number."""
        text = self.options.get(key)
        try:
            value = default if text is None else float(text)
        except ValueError:
            value = np.nan
        if not np.isfinite(value):
            raise ConfigError(f"--metric-option {key}={str(text)[:40]}: expected a number.")
        return value

    def whole(self, key: str, default: int) -> int:
        """An option that is a whole number from 0."""
        value = self.number(key, default)
        if value != int(value) or value < 0:
            raise ConfigError(
                f"--metric-option {key}={self.options[key][:40]}: expected a whole number from 0."
            )
        return int(value)

    def output(self, outputs: Outputs, key: str, fits: Mapping[str, bool], what: str) -> Values:
        """The output that an option names, or the first that fits, which is noted where several
        do. Raises ConfigError."""
        named = self.options.get(key)
        shapes = ", ".join(f"'{n}' {list(v.shape)}" for n, v in outputs.items())
        if named is not None:
            if named not in outputs:
                raise ConfigError(
                    f"--metric-option {key}={named[:60]}: the model has no such output, only"
                    f" {shapes}."
                )
            return outputs[named]
        fitting = [name for name, good in fits.items() if good]
        if not fitting:
            raise ConfigError(
                f"--metric {self.name}: no output is {what}, only {shapes}; name it with"
                f" --metric-option {key}=NAME."
            )
        if len(fitting) > 1:
            self.guess(f"{key}={fitting[0]}, the first of {len(fitting)} outputs that may be it")
        return outputs[fitting[0]]


def by_image(metric: Metric, names: Sequence[str], value: Values) -> Values:
    """An output whose first dimension is the batch. Raises ImageError."""
    if value.ndim == 0 or len(value) != len(names):
        raise ImageError(
            f"--metric {metric.name}: an output {list(value.shape)} of {len(names)} images is not"
            " one for each: use --batch 1."
        )
    return value


def score(metric: Metric, found: Running, plain: Running | None) -> Score:
    """What was found, beside the float model's; ``plain`` None: it has what equals it, or was not
    measured."""
    own = found.figures()
    other = {} if plain is None else plain.figures()
    as_float = metric.targets is None
    value = other.get(metric.figure, metric.perfect if as_float else None)
    return Score(
        metric=metric.name,
        figure=metric.figure,
        unit=metric.unit,
        higher=metric.higher,
        targets=AS_FLOAT if metric.targets is None else metric.targets.name,
        images=found.count,
        value=own[metric.figure],
        float_value=value,
        figures=own,
        float_figures=other,
        guessed=tuple(metric.guessed),
    )


class Scoring:
    """A metric over the batches of a run, of the model and, where that says more than itself, of
    the float model beside it. Raises ConfigError where there is nothing to hold answers against."""

    def __init__(self, metric: Metric, *, reference: bool) -> None:
        if metric.targets is None and not reference:
            raise ConfigError(
                f"--metric {metric.name} needs a truth: --targets PATH, or the float model as"
                " --reference FLOAT.onnx."
            )
        self.metric, self.found = metric, metric.begin()
        both = reference and (metric.targets is not None or metric.perfect is None)
        self.plain = metric.begin() if both else None

    def add(self, names: Sequence[str], outputs: Outputs, reference: Outputs | None) -> None:
        """Fold in a batch. Raises ImageError, ConfigError."""
        self.found.add(names, outputs, reference)
        if self.plain is not None and reference is not None:
            self.plain.add(names, reference, reference)

    def score(self) -> Score:
        """What was found."""
        return score(self.metric, self.found, self.plain)
