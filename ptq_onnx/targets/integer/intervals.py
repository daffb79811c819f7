"""Intervals of whole numbers, per element, of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bounds = NDArray[Any]
"""Python integers in an object array that broadcasts against the tensor."""


@dataclass(frozen=True, eq=False)
class Interval:
    """Two arrays of bounds, of at least one axis."""

    low: Bounds
    high: Bounds

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", as_objects(self.low))
        object.__setattr__(self, "high", as_objects(self.high))

    @classmethod
    def of(cls, low: Any, high: Any) -> Interval:
        """From numbers or arrays of any type."""
        return cls(low, high)

    @cached_property
    def least(self) -> int:
        """The smallest value of any channel."""
        return int(self.low.min())

    @cached_property
    def most(self) -> int:
        """The largest value of any channel."""
        return int(self.high.max())

    def collapsed(self) -> Interval:
        """One interval for all channels."""
        return Interval.of(self.least, self.most)


def as_objects(x: Any) -> Bounds:
    """Python integers, which cannot overflow, of numbers or arrays."""
    array = np.asarray(x)
    return np.atleast_1d(array if array.dtype == object else array.astype(object))


def corners(op: Callable[[Any, Any], Any], x: Interval, y: Interval) -> Interval:
    """The extremes of a function that is monotonic in both arguments by parts."""
    results = [op(a, b) for a in (x.low, x.high) for b in (y.low, y.high)]
    low, high = results[0], results[0]
    for result in results[1:]:
        low, high = np.minimum(low, result), np.maximum(high, result)
    return Interval(low, high)


def truncated(x: Any, y: Any) -> Any:
    """ONNX's integer division, towards zero."""
    sign = np.where((x < 0) == (y < 0), 1, -1)
    return sign * (abs(x) // abs(y))
