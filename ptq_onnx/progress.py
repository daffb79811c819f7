"""Progress of a job of several stages: every stage ends at its total, and one bar tells of all.

A stage ends where the next one begins. What calls (:data:`Progress`) is any function of a stage's
name and total that returns what to call with steps done; the whole job is a stage too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Advance = Callable[[int], None]
Progress = Callable[[str, int], Advance]
"""Called with (stage, steps in all); returns what is called with steps done."""

WHOLE = "All"
"""The stage that is the whole job."""
UNITS = 1000
"""Its steps."""


@dataclass(frozen=True)
class Planned:
    """A stage that is to come, and its share of the job's time. ``open``: it comes several times,
    no one knows how often."""

    name: str
    weight: float
    open: bool = False


class Stages:
    """Begins one stage after the other, and tells ``progress`` of each and of the whole."""

    def __init__(self, progress: Progress | None, plan: Sequence[Planned] = ()) -> None:
        self._progress = progress
        self._plan = tuple(plan)
        self._place = 0
        """The planned stage that runs, or is next."""
        self._span = 0.0, 0.0
        """Where the running stage begins and ends, as a share of the job."""
        self._name: str | None = None
        self._total = self._done = self._told = 0
        self._advance: Advance = silent
        self._overall = silent if progress is None else progress(WHOLE, UNITS)

    def plan(self, plan: Sequence[Planned]) -> None:
        """What is still to come."""
        self._plan, self._place = tuple(plan), 0

    def __call__(self, name: str, total: int) -> Advance:
        """Begin a stage of ``total`` steps; the one before is over."""
        self._end()
        left = 1 - self._span[1]
        ahead = [p.weight for p in self._plan[self._place :]]
        names = [p.name for p in self._plan]
        index = names.index(name, self._place) if name in names[self._place :] else -1
        start = end = self._span[1]
        if index >= 0:
            rest = max(sum(ahead), 1e-9)
            start += left * sum(ahead[: index - self._place]) / rest
            end = start + left * self._plan[index].weight / rest
            if self._plan[index].open:  # it may come again
                end = (start + end) / 2
                kept = Planned(name, self._plan[index].weight / 2, True)
                self._plan = (*self._plan[:index], kept, *self._plan[index + 1 :])
            self._place = index if self._plan[index].open else index + 1
        self._span, self._name = (start, end), name
        self._total, self._done = total, 0
        self._advance = silent if self._progress is None else self._progress(name, total)
        self._tell()
        return self._step

    def done(self) -> None:
        """The job is over."""
        self._end()
        self._span = 1.0, 1.0
        self._tell()

    def _step(self, count: int) -> None:
        """Steps of the running stage; no more than it has."""
        count = min(count, self._total - self._done)
        if count > 0:
            self._done += count
            self._advance(count)
            self._tell()

    def _end(self) -> None:
        if self._name is not None:
            self._step(self._total - self._done)
            self._name = None

    def _tell(self) -> None:
        start, end = self._span
        share = self._done / self._total if self._total else 0.0
        units = int(UNITS * (start + (end - start) * share) + 1e-6)
        if units > self._told:
            self._overall(units - self._told)
            self._told = units


class Report(Protocol):
    """Begins a stage that runs the calibration images so many times."""

    def __call__(self, name: str, *, runs: int = 1) -> Advance:
        """Begin the stage; returns what is called with images done."""


def silent(_: int) -> None:
    """Where no one asks."""


def untold(name: str, *, runs: int = 1) -> Advance:
    """A :class:`Report` where no one asks."""
    return silent
