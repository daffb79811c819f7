"""Whether ranges still grew when calibration ended: the sign of too few images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

POINTS = 64
"""Points that a trace keeps at most; beyond, it forgets every second one."""
SHARE = Fraction(2, 3)
"""Where the last part of the images begins."""
MUCH = 0.1
"""Growth of a range in that part, relative to what it was before, that counts."""
FEW = 0.05
"""Share of the tensors from which such growth is worth a word. Extremes have heavy tails: on
ViT-Ti and DeiT-Ti it is 10 to 14 % at 8 images, 2 to 4 % at any number from 32 to 256."""
HUGE = 0.5
"""Growth that is worth a word in a single tensor."""


@dataclass
class RangeTrace:
    """The extremes of a whole tensor over the images seen so far.

    ``points``: (images, lowest, highest), the last one current, the others at least ``stride``
    images apart. Their number has a bound: where it is reached, every second one goes and the
    stride doubles, so memory does not grow and the whole run stays covered.
    """

    points: list[tuple[int, float, float]] = field(default_factory=list)
    stride: int = 1

    def add(self, images: int, low: float, high: float) -> None:
        """Fold in the extremes of one image or more, ``images`` having been seen in all."""
        if self.points:
            _, lowest, highest = self.points[-1]
            low, high = min(low, lowest), max(high, highest)
        if len(self.points) > 1 and self.points[-1][0] - self.points[-2][0] < self.stride:
            self.points.pop()
        self.points.append((images, low, high))
        if len(self.points) > POINTS:
            self.points = [*self.points[:-1:2], self.points[-1]]
            self.stride = self.points[1][0] - self.points[0][0]

    def growth(self, share: Fraction = SHARE) -> float | None:
        """Growth of the width since ``share`` of the images, relative to the width then.

        0.1: a tenth wider. None where no point lies at or before, or the range was empty.
        """
        if not self.points:
            return None
        images, low, high = self.points[-1]
        before = [p for p in self.points if p[0] <= share * images]
        if not before:
            return None
        _, low_then, high_then = before[-1]
        width = high_then - low_then
        return (high - low - width) / width if width > 0 else None


@dataclass(frozen=True)
class Growth:
    """How many of the ``total`` tensors grew by more than ``threshold``, the worst first."""

    total: int
    threshold: float
    grown: tuple[tuple[str, float], ...]

    @property
    def warning(self) -> str | None:
        """A sentence; None where nothing grew much, or only what always does."""
        if not self.grown:
            return None
        name, worst = self.grown[0]
        if len(self.grown) < FEW * self.total and worst <= HUGE:
            return None
        return (
            f"The ranges of {len(self.grown)} of {self.total} tensors still grew by more than"
            f" {100 * self.threshold:.0f} % over the last third of the calibration images, most"
            f" that of {name} (by {100 * worst:.0f} %): give more images (--images)."
        )


def find_growth(traces: Mapping[str, RangeTrace], threshold: float = MUCH) -> Growth:
    """Growth by the tensors' names."""
    found = {name: trace.growth() for name, trace in traces.items()}
    grown = [(name, value) for name, value in found.items() if value and value > threshold]
    grown.sort(key=lambda pair: -pair[1])
    return Growth(len(found), threshold, tuple(grown))
