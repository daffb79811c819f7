"""A function of the user's: arrays of all outputs and the targets in, a number out.

The outputs of all images lie in files while they are collected, and are mapped, so that memory does
not grow with the images; the disk holds them, of the float model too where there are no targets.
"""

from __future__ import annotations

import importlib
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.errors import ConfigError, ImageError, one_line
from ptq_onnx.evaluation.metrics.metric import Metric, Outputs, Running
from ptq_onnx.evaluation.metrics.targets import Targets

Arrays = dict[str, NDArray[Any]]
Function = Callable[[Arrays, Any], Any]


@dataclass
class Own(Metric):
    """``module:function``. Its attribute ``higher_is_better``, or the option ``better``, says which
    way is up."""

    figure: ClassVar[str] = "value"
    unit: ClassVar[str] = ""
    perfect: ClassVar[float | None] = None
    takes: ClassVar[dict[str, str]] = {"better": "higher or lower"}
    called: str = ""
    function: Function | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.function = imported(self.called)
        up = bool(getattr(self.function, "higher_is_better", True))
        words = ("higher", "lower") if up else ("lower", "higher")
        # Of the instance: every function has its own.
        self.higher = self.word("better", words) == "higher"  # type: ignore[misc]
        self.name = self.called  # type: ignore[misc]

    def begin(self) -> Running:
        """Nothing collected."""
        return _Collected(self)

    def value(self, outputs: Arrays, targets: Any) -> float:
        """What the function says. Raises ConfigError, one line, for what it raises."""
        assert self.function is not None
        try:
            found = float(self.function(outputs, targets))
        except Exception as error:  # whatever the user's code raises
            raise ConfigError(
                f"--metric {self.called} raised {type(error).__name__}: {one_line(error)[:200]}."
            ) from error
        if not math.isfinite(found):
            raise ConfigError(f"--metric {self.called} returned {found}: expected a finite number.")
        return found


class _Collected(Running):
    """The outputs of all images, in files."""

    def __init__(self, metric: Own) -> None:
        self.metric = metric
        self._mine, self._floats = _Spool(), _Spool()
        self._names: list[str] = []

    def add(self, names: Sequence[str], outputs: Outputs, reference: Outputs | None) -> None:
        """Keep a batch."""
        self._mine.add(len(names), outputs)
        if self.metric.targets is None and reference is not None:
            self._floats.add(len(names), reference)
        self._names += names
        self.count += len(names)

    def figures(self) -> dict[str, float]:
        """The function's number."""
        targets: Any = self._floats.arrays()
        if self.metric.targets is not None:
            targets = OfImages(self.metric.targets, self._names)
        return {self.metric.figure: self.metric.value(self._mine.arrays(), targets)}


@dataclass(frozen=True)
class OfImages(Sequence[Any]):
    """The targets of all images, read when they are asked for."""

    targets: Targets
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.targets.anything(name) for name in self.names[index]]
        return self.targets.anything(self.names[index])


class _Spool:
    """Arrays by name, batch behind batch, in files without names."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[IO[bytes], np.dtype[Any], tuple[int, ...]]] = {}
        self._count = 0

    def add(self, count: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Behind what is there. Raises ImageError for outputs that are not one for each image."""
        for name, value in values.items():
            if value.ndim == 0 or len(value) != count:
                raise ImageError(
                    f"Output '{name}' {list(value.shape)} of {count} images is not one for each:"
                    " use --batch 1."
                )
            if name not in self._files:
                made = tempfile.TemporaryFile(prefix="ptq_onnx-")  # noqa: SIM115
                self._files[name] = made, value.dtype, value.shape[1:]
            file, dtype, shape = self._files[name]
            if (value.dtype, value.shape[1:]) != (dtype, shape):
                raise ImageError(
                    f"Output '{name}' is {list(value.shape[1:])} of one image and {list(shape)} of"
                    " another: a function of your own takes outputs of one size."
                )
            file.write(np.ascontiguousarray(value).tobytes())
        self._count += count

    def arrays(self) -> Arrays:
        """[N, …] by name, mapped; an array without elements as it is."""
        found: Arrays = {}
        for name, (file, dtype, shape) in self._files.items():
            file.flush()
            whole = (self._count, *shape)
            empty = math.prod(whole) == 0
            found[name] = (
                np.empty(whole, dtype) if empty else np.memmap(file, dtype, "r", shape=whole)
            )
        return found


def imported(called: str) -> Function:
    """``module:function``, from the working directory too. Raises ConfigError."""
    module, _, name = called.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except Exception as error:  # its code may raise anything
        raise ConfigError(
            f"--metric {called}: module '{module}' cannot be imported"
            f" ({type(error).__name__}: {one_line(error)[:200]})."
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    function = getattr(found, name, None)
    if not callable(function):
        raise ConfigError(f"--metric {called}: module '{module}' has no function '{name}'.")
    return function  # type: ignore[no-any-return]
