"""What the integers of a tensor mean: real value = (code - zero) · scale + offset."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.blocks.masks import SHUT_OUT
from ptq_onnx.errors import ModelError
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.spec import TensorSpec

Ints = NDArray[np.int64]
Double = NDArray[np.float64]


def no_offset() -> Double:
    """A grid's offset where there is none."""
    return np.zeros((), np.float64)


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of a tensor's integers; arrays broadcast against the tensor.

    ``alpha``: exponents of PTF, where ``scale`` is ``step`` · 2^alpha; None where the scale
    has no such form. ``offset`` is the bias that an accumulator has not got yet. ``rows``: factors
    of rows, which ``scale`` has, and ``step`` has not.
    """

    scale: Double
    zero: Ints
    low: int
    high: int
    alpha: Ints | None = None
    step: float = 0.0
    offset: Double = field(default_factory=no_offset)
    accumulator: bool = False
    rows: Double | None = None

    def __str__(self) -> str:
        kind = "accumulator" if self.accumulator else "codes"
        per = " per channel" if np.size(self.scale) > 1 else ""
        return f"{kind} {self.low}…{self.high}{per}"

    @classmethod
    def of(cls, spec: TensorSpec) -> Grid:
        """The grid of a tensor's uniform codes. Signed codes are stored as they are. Raises
        ModelError for other codes."""
        if spec.rule.code != Uniform():
            raise ModelError(
                f"Tensor '{spec.tensor}': the target integer has no grid for"
                f" '{spec.rule.code.name}' codes here; use --target onnxruntime."
            )
        step, low, high = float(spec.scale), *spec.rule.limits
        factor = np.ones((), np.float64)
        alpha: Ints | None = np.zeros((), np.int64)
        if spec.factor is not None:
            factor = spec.factor.astype(np.float64)
            found = np.round(np.log2(factor)).astype(np.int64)
            alpha = found if bool(np.all(np.exp2(found) == factor)) else None
        return cls(step * factor, np.asarray(spec.zero_point, np.int64), low, high, alpha, step)

    def ints(self, values: NDArray[Any]) -> Ints:
        """The integers of real values that lie on the grid (float32 or float64)."""
        real = (values.astype(np.float64) - self.offset) / self.scale
        return np.asarray(np.rint(real), np.int64) + self.zero

    def floats(self, ints: Ints) -> NDArray[Any]:
        """Real values of integers: float32 for codes, float64 for accumulators, exactly
        enough that :meth:`ints` finds them again."""
        values = (ints - self.zero) * self.scale + self.offset
        return values if self.accumulator else np.asarray(values, np.float32)


@dataclass(frozen=True, eq=False)
class MaskedGrid(Grid):
    """Codes from 0 on, and -1 where logits are shut out: real values ``SHUT_OUT`` below the
    least."""

    @classmethod
    def of_codes(cls, grid: Grid) -> MaskedGrid:
        """Of logits on that grid, which has one scale."""
        return cls(grid.scale, grid.zero, grid.low, grid.high, grid.alpha, grid.step)

    def ints(self, values: NDArray[Any]) -> Ints:
        """Codes, -1 for all below the least."""
        return np.maximum(super().ints(values), -1)

    def floats(self, ints: Ints) -> NDArray[Any]:
        """Real values, float32."""
        found = super().floats(np.maximum(ints, 0))
        return np.where(ints < 0, found + np.float32(SHUT_OUT), found)


@dataclass(frozen=True, eq=False)
class OpenGrid(Grid):
    """A mask: 1, and 0 for what it shuts out."""

    @classmethod
    def of_mask(cls) -> OpenGrid:
        """The only one."""
        return cls(np.ones(()), np.zeros((), np.int64), 0, 1, step=1.0)

    def ints(self, values: NDArray[Any]) -> Ints:
        """0 for numbers that shut out."""
        return np.asarray(values > SHUT_OUT, np.int64)


@dataclass(frozen=True, eq=False)
class LogGrid(Grid):
    """Log2 codes of an attention map: 2^-code, and zero beyond ``last``."""

    last: int = 0

    @classmethod
    def codes(cls, last: int) -> LogGrid:
        """Codes 0 … last, and last + 1, which stands for zero."""
        return cls(np.ones(()), np.zeros((), np.int64), 0, last + 1, last=last)

    def ints(self, values: NDArray[Any]) -> Ints:
        """The exponents of shares in [0, 1]; what is not positive gets the one beyond ``last``."""
        real = values.astype(np.float64)
        code = -np.log2(np.where(real > 0, real, 2.0 ** -(self.last + 1)))
        return np.asarray(np.rint(code), np.int64)

    def floats(self, ints: Ints) -> NDArray[Any]:
        """2^-code, float32; 0 beyond ``last``."""
        return np.where(ints > self.last, 0.0, np.exp2(-ints.astype(np.float64))).astype(np.float32)


@dataclass(frozen=True, eq=False)
class ShareGrid(Grid):
    """Uniform codes of an attention map's shares of each row's largest value, which has the code
    ``high``. Real values are those of rows that sum to one."""

    @classmethod
    def codes(cls, top: int) -> ShareGrid:
        """Codes 0 … top."""
        return cls(np.ones(()), np.zeros((), np.int64), 0, top, step=1.0)

    def ints(self, values: NDArray[Any]) -> Ints:
        """The codes of rows (the last axis), whatever they sum to."""
        real = values.astype(np.float64)
        return np.asarray(np.rint(real / real.max(axis=-1, keepdims=True) * self.high), np.int64)

    def floats(self, ints: Ints) -> NDArray[Any]:
        """Codes over the sum of their row, float32."""
        return np.asarray(ints / ints.sum(axis=-1, keepdims=True), np.float32)
