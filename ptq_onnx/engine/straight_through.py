"""Rounding that gradients pass: codes of the forward run, the identity's gradient inside the range.

Learned steps get their gradient by that alone (LSQ, arXiv 1902.08153): of s·r(x / s) it is
r(x / s) - x / s inside, and the end's code outside.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.codes.logarithmic import Logarithmic
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.spec import Rule, TensorSpec

Tensor = torch.Tensor


class _RoundClip(torch.autograd.Function):
    """clip(round(x), low, high)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The codes; which are inside is kept."""
        rounded = torch.round(x)
        ctx.save_for_backward((rounded >= low) & (rounded <= high))
        return torch.clamp(rounded, low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient as it is, zero outside."""
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


class _Nearest(torch.autograd.Function):
    """The nearest of ascending levels, ``borders`` lying between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor, borders: Tensor) -> Tensor:
        """The levels; which are inside is kept."""
        ctx.save_for_backward((x >= levels[0]) & (x <= levels[-1]))
        return levels[torch.bucketize(x.detach(), borders)]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient as it is, zero outside."""
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


def knows(rule: Rule) -> bool:
    """Whether :class:`Rounding` can round by a rule."""
    code = isinstance(rule.code, (Uniform, Logarithmic))
    around = {type(one) for one in rule.around} <= {RowMaximum, RowSums}
    return code and around and not rule.grain.block_size


def ends_of(spec: TensorSpec, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The smallest and the largest code less the zero point: [], or [N] of a weight [K, N] whose
    columns have zero points of their own."""
    zero = np.unique(spec.zero_point) if np.ptp(spec.zero_point) == 0 else spec.zero_point
    low, high = (np.asarray(end - zero, np.float32) for end in spec.rule.limits)
    return torch.from_numpy(low).to(device), torch.from_numpy(high).to(device)


def round_clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Whole numbers from ``low`` to ``high``."""
    found: Tensor = _RoundClip.apply(x, low, high)  # type: ignore[no-untyped-call]
    return found


class Rounding:
    """Quantized and dequantized values of one tensor, for a step that may be learned.

    Where the tensor is divided by its row's maximum and its product by the row's sum, the values
    are relative to the maximum, which the product does not see.
    """

    def __init__(self, spec: TensorSpec, device: str = "cpu") -> None:
        rule = spec.rule
        self.rows, self.sums = RowMaximum() in rule.around, RowSums() in rule.around
        low, high = rule.limits
        self._ends = ends_of(spec, device)
        self._levels: tuple[Tensor, Tensor] | None = None
        if isinstance(rule.code, Logarithmic):
            unit = np.asarray(1, np.float32)
            numbers = TensorSpec(spec.tensor, rule, unit, spec.zero_point, details=spec.details)
            codes = np.arange(low, high + 1, dtype=np.int32)
            levels = np.sort(rule.code.values(codes, numbers.numbers(None)).astype(np.float64))
            both = levels, (levels[1:] + levels[:-1]) / 2
            first, second = (torch.from_numpy(v.astype(np.float32)).to(device) for v in both)
            self._levels = first, second
        self._factor = None if spec.factor is None else torch.from_numpy(spec.factor).to(device)

    def __call__(self, x: Tensor, scale: Tensor) -> Tensor:
        """The values of ``x``, of any shape, for a step ``scale``."""
        if self.rows:
            top = x.amax(dim=-1, keepdim=True)
            top = torch.where(top > 0, top, torch.ones_like(top))
            found = self._steps(x / top, scale)
            return found if self.sums else found * top
        if self._factor is None:
            return self._steps(x, scale)
        return self._steps(x / self._factor, scale) * self._factor

    def _steps(self, x: Tensor, scale: Tensor) -> Tensor:
        units = x / scale
        if self._levels is None:
            return round_clip(units, *self._ends) * scale
        found: Tensor = _Nearest.apply(units, *self._levels)  # type: ignore[no-untyped-call]
        return found * scale
