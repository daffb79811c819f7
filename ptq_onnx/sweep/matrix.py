"""What a sweep is: its axes, and the cells that they make, as values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from ptq_onnx.config.options import configured
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, PtqError

AXES = ("model", "recipe", "target", "bits", "calib", "seed")
"""The axes of the matrix, in the order of a cell's name."""
EVEN = "even"
"""What the axis ``seed`` calls images that are spread evenly, without a seed."""
MOST_CELLS = 100_000


@dataclass(frozen=True)
class Entry:
    """One value of an axis: how it is called, the ``options`` that it stands for, and its ``path``,
    where it is a file or a folder."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A matrix as its file states it, paths made absolute.

    ``axes``: the entries of each axis. ``options``: those of all cells. ``exclude``: by axis the
    patterns of names of which one must fit, for all axes named. ``retries``: of a cell whose
    process ended.
    """

    axes: Mapping[str, tuple[Entry, ...]]
    val: str | None = None
    labels: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    exclude: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    retries: int = 1
    gpus: float = 0
    """Of a cell, as Ray counts them; several cells share one where it is a part."""


@dataclass(frozen=True)
class Cell:
    """One quantization. ``axes``: its place, name by axis. ``config`` None: it is refused, and
    ``refusal`` says why."""

    axes: Mapping[str, str]
    model: Path
    calib: str | None
    val: str | None
    labels: str | None
    config: QuantizeConfig | None
    refusal: str | None = None

    @property
    def name(self) -> str:
        """Its folder within that of the sweep."""
        model, *rest = (self.axes[axis].replace("/", "-") for axis in AXES)
        return f"{model}/{'_'.join(rest)}"


def cells_of(sweep: Sweep) -> list[Cell]:
    """All cells but the excluded ones, in the order of the axes. Raises ConfigError."""
    count = 1
    for entries in sweep.axes.values():
        count *= len(entries)
    if count > MOST_CELLS:
        raise ConfigError(f"The sweep has {count} cells; at most {MOST_CELLS} are run at a time.")
    used = [0] * len(sweep.exclude)
    cells = []
    for entries in product(*(sweep.axes[axis] for axis in AXES)):
        names = {axis: entry.name for axis, entry in zip(AXES, entries, strict=True)}
        fits = [_fits(names, patterns) for patterns in sweep.exclude]
        used = [n + fit for n, fit in zip(used, fits, strict=True)]
        if not any(fits):
            cells.append(_cell(sweep, names, entries))
    for patterns, n in zip(sweep.exclude, used, strict=True):
        if n == 0:
            told = ", ".join(f"{axis}: {' or '.join(words)}" for axis, words in patterns.items())
            raise ConfigError(f"exclude ({told}) fits no cell: see the names of the entries.")
    twice = [name for name, n in Counter(cell.name for cell in cells).items() if n > 1]
    if twice:
        raise ConfigError(f"Two cells would share the folder {twice[0]}: rename an entry.")
    if not cells:
        raise ConfigError("The sweep has no cells: exclude leaves none.")
    if all(cell.config is None for cell in cells):
        raise ConfigError(f"Every cell is refused, the first so: {cells[0].refusal}")
    return cells


def varied(cells: Sequence[Cell]) -> list[str]:
    """The axes on which the cells differ."""
    return [axis for axis in AXES if len({cell.axes[axis] for cell in cells}) > 1]


def _fits(names: Mapping[str, str], patterns: Mapping[str, tuple[str, ...]]) -> bool:
    return all(any(fnmatchcase(names[a], p) for p in words) for a, words in patterns.items())


def _cell(sweep: Sweep, names: Mapping[str, str], entries: Sequence[Entry]) -> Cell:
    """The cell at one place; refused where its options do not go together."""
    options: dict[str, Any] = {"threads": 1, **sweep.options}
    for entry in entries:
        options |= entry.options
    config, refusal = None, None
    try:
        config = configured(None, options)
    except PtqError as error:
        refusal = str(error)
    model, calib = entries[AXES.index("model")].path, entries[AXES.index("calib")].path
    assert model is not None
    return Cell(names, Path(model), calib, sweep.val, sweep.labels, config, refusal)
