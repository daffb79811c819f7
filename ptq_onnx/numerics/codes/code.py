"""What every code owes: its arithmetic on arrays, and the ONNX nodes that compute the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.errors import ConfigError
from ptq_onnx.numerics.builder import Builder, V

Array = NDArray[np.float32]
Codes = NDArray[np.int32]
Levels = NDArray[Any]

Storage = Literal["uint8", "int8", "uint4", "uint16", "int16"]
"""The type of integer codes in the file."""

TINY = float(np.finfo(np.float32).tiny) * 2**32
"""The smallest scale: division by it stays finite for every activation below 2^30."""


@dataclass(frozen=True, eq=False)
class Numbers:
    """The numbers of a tensor's codes; arrays broadcast against the tensor.

    ``details`` are the code's own, by the names in its ``details``.
    """

    bits: int
    signed: bool
    scale: NDArray[Any]
    zero_point: Codes
    details: Mapping[str, int] = field(default_factory=dict)
    stored: Storage = "uint8"


@dataclass(frozen=True, eq=False)
class Solved:
    """Scale and zero point, both of the shape of the bounds, and the code's own numbers."""

    scale: Array
    zero_point: Codes
    details: Mapping[str, int] = field(default_factory=dict)


class Code(ABC):
    """A way to hold real numbers in a few bits. Its subclasses are frozen dataclasses."""

    name: ClassVar[str]
    details: ClassVar[Mapping[str, tuple[int, int]]] = {}
    """Whole numbers besides scale and zero point that a tensor's codes need, with their ranges."""
    fixed: ClassVar[str | None] = None
    """What a code's value is where no scale has a say in it."""
    per_channel: ClassVar[bool] = True
    """A step of its own for every channel may go with these codes."""
    floating: ClassVar[bool] = False
    """Steps grow with the values: a range need not be small."""
    widest: ClassVar[int] = 8
    """The most bits."""
    wider: ClassVar[str] = ""
    """An option that gives codes of more bits."""
    instead: ClassVar[str] = ""
    """What to do where no integer kernel multiplies these codes."""

    @abstractmethod
    def limits(self, bits: int, signed: bool) -> tuple[int, int]:
        """Smallest and largest code."""

    @abstractmethod
    def solve(self, low: Array, high: Array, bits: int, signed: bool, symmetric: bool) -> Solved:
        """Numbers with which the codes cover [low, high] (any shape); zero is always a value."""

    @abstractmethod
    def codes(self, x: Array, numbers: Numbers) -> Codes:
        """Codes of values (shape of ``x``). NaN is not allowed."""

    @abstractmethod
    def values(self, codes: Codes, numbers: Numbers) -> Array:
        """What codes stand for, float32."""

    @abstractmethod
    def reach(self, numbers: Numbers) -> tuple[NDArray[Any], NDArray[Any]]:
        """The smallest and the largest value, in the shape of the scale."""

    @abstractmethod
    def clipped(self, x: Array, numbers: Numbers) -> NDArray[np.bool_]:
        """Which values lie more than half a step beyond the smallest and the largest."""

    @abstractmethod
    def emit(self, builder: Builder[V], value: V, numbers: Numbers) -> V:
        """Nodes that compute ``values(codes(value))``; the codes are called ``…_quantized``."""

    def read_details(self, data: Mapping[str, Any]) -> dict[str, int]:
        """The code's own numbers from a report. Raises ValueError."""
        found = {}
        for name, (least, most) in self.details.items():
            value = data.get(name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} of codes '{self.name}' is not from {least} to {most}")
            found[name] = value
        return found

    def misfit(self, numbers: Numbers) -> str | None:
        """What is wrong with numbers from outside; None where they can be."""
        return None

    def recognise(self, levels: Levels) -> bool:
        """True where a table of values [N], looked up by codes of 8 bits, is one of this code."""
        return False

    def weight_scale(self, weight: Array, axis: int | None, bits: int) -> Array:
        """Scale of a weight per slice along ``axis`` ([N]), or one ([]). Raises ConfigError."""
        raise ConfigError(f"Codes '{self.name}' hold no weights.")

    def stored(self, codes: Codes, storage: Storage, signed: bool) -> NDArray[Any]:
        """Codes of a weight, or zero points, in the type that they have in the file."""
        raise ConfigError(f"Codes '{self.name}' hold no weights.")
