"""How many numbers a tensor has: one scale, one per channel, powers of two, blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.numerics.codes.code import Storage

Granularity = Literal["tensor", "channel", "ptf"]


@dataclass(frozen=True)
class Grain:
    """One of the grains below."""

    name: ClassVar[Granularity]
    """In reports."""
    per_channel: ClassVar[bool] = True
    """Channels differ, in scale or by a factor."""
    storage: ClassVar[Storage] = "int8"
    """The type of a weight's codes in the file."""

    @property
    def block_size(self) -> int:
        """Rows that share a scale of a column; 0: all."""
        return 0

    def spread(
        self, vector: NDArray[Any], axis: int | None, shape: tuple[int, ...]
    ) -> NDArray[Any]:
        """Scales or zero points in a form that broadcasts against a tensor of ``shape``."""
        return along(vector, axis, len(shape))


@dataclass(frozen=True)
class PerTensor(Grain):
    """One scale."""

    name: ClassVar[Granularity] = "tensor"
    per_channel: ClassVar[bool] = False


@dataclass(frozen=True)
class PerChannel(Grain):
    """One scale per channel of a weight; of an activation one, and a ratio per channel."""

    name: ClassVar[Granularity] = "channel"


@dataclass(frozen=True)
class PowersOfTwo(Grain):
    """One scale, and a power of two per channel (PTF, FQ-ViT)."""

    name: ClassVar[Granularity] = "ptf"


@dataclass(frozen=True)
class Blocks(Grain):
    """One scale and zero point for ``rows`` rows of each column of a weight [K, N]."""

    name: ClassVar[Granularity] = "channel"
    storage: ClassVar[Storage] = "uint4"
    rows: int = 32

    @property
    def block_size(self) -> int:
        """Rows of a block."""
        return self.rows

    def spread(
        self, vector: NDArray[Any], axis: int | None, shape: tuple[int, ...]
    ) -> NDArray[Any]:
        """A number for each block of rows, repeated for each row of a weight of ``shape`` [K,
        N]."""
        return np.repeat(vector, self.rows, axis=0)[: shape[0]]


GRAINS: tuple[Grain, ...] = (PerTensor(), PerChannel(), PowersOfTwo())


def grain_named(name: str, block_size: int = 0) -> Grain:
    """Raises ValueError for a name that no grain has."""
    if block_size:
        return Blocks(block_size)
    for grain in GRAINS:
        if grain.name == name:
            return grain
    raise ValueError(f"there is no granularity '{name[:40]}'")


def along(vector: NDArray[Any], axis: int | None, ndim: int) -> NDArray[Any]:
    """Reshape a vector so that it broadcasts along ``axis`` of an ``ndim``-d tensor."""
    if axis is None or vector.ndim == 0:
        return vector
    shape = [1] * ndim
    shape[axis] = -1
    return vector.reshape(shape)
