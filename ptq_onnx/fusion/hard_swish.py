"""HardSigmoid, clip(x + 3, 0, 6) / 6, and HardSwish, x times that, in the spellings of exporters.

Both are standard ops. Source of the functions: Howard et al., arXiv 1905.02244, section 5.2.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ptq_onnx.fusion.rule import Context, Op, Result, Rule, Term, fuse_with
from ptq_onnx.graph.formula import TOLERANCE, scalar

SHIFT, TOP = 3.0, 6.0
SLOPE, MIDDLE = 1 / TOP, 0.5


class _Hard(Rule):
    """What the rules check: the four numbers."""

    def bounds(
        self, result: Result, x: ir.Value, b: ir.Value, low: ir.Value, high: ir.Value
    ) -> Result:
        """Fails unless x is float, b = 3, and the result is clipped to 0 … 6."""
        if x.dtype not in (None, ir.DataType.FLOAT):
            return result.fail("x must be float.", x)
        if scalar(b) != SHIFT:
            return result.fail("The shift must be 3.", b)
        if (scalar(low), scalar(high)) != (0.0, TOP):
            return result.fail("It must be clipped to 0 … 6.", low)
        return result

    def divisor(self, result: Result, d: ir.Value, expected: float) -> Result:
        """Fails unless the last number is 6, or 1/6 as far as exporters write it out."""
        found = scalar(d)
        if found is None or abs(found - expected) > TOLERANCE * expected:
            return result.fail("The divisor must be 6.", d)
        return result


class _HardSigmoid(_Hard):
    """clip(x + 3, 0, 6), and a number behind it."""

    last: ClassVar[float]
    """That number."""

    def check(
        self, context: Context, x: ir.Value, b: ir.Value, low: ir.Value, high: ir.Value,
        d: ir.Value,
    ) -> Result:  # fmt: skip
        """Fails unless the numbers are 3, 0, 6 and ``last``."""
        result = self.bounds(self.begin(context), x, b, low, high)
        return self.divisor(result, d, self.last) if result else result

    def rewrite(self, op: Op, x: ir.Value, **_: object) -> ir.Value:
        """One HardSigmoid."""
        return self.named(op.HardSigmoid(x, alpha=SLOPE, beta=MIDDLE))


class HardSigmoidDiv(_HardSigmoid):
    """The quotient."""

    last = TOP

    def pattern(self, op: Op, x: Term, b: Term, low: Term, high: Term, d: Term) -> Term:
        """clip(x + 3, 0, 6) / 6"""
        return op.Div(op.Clip(op.Add(x, b), low, high), d)


class HardSigmoidMul(_HardSigmoid):
    """The product with 1/6."""

    last = SLOPE

    def pattern(self, op: Op, x: Term, b: Term, low: Term, high: Term, d: Term) -> Term:
        """clip(x + 3, 0, 6) · ⅙"""
        return op.Mul(op.Clip(op.Add(x, b), low, high), d)


class HardSwishMul(_Hard):
    """The gate is a HardSigmoid."""

    def pattern(self, op: Op, x: Term) -> Term:
        """x · hardsigmoid(x)"""
        gate = op.HardSigmoid(x, _allow_other_attributes=True, _outputs=["gate"])
        return op.Mul(x, gate)

    def check(self, context: Context, x: ir.Value, gate: ir.Value) -> Result:
        """Fails unless its slope is 1/6 and its middle 1/2."""
        result = self.begin(context)
        node = gate.producer()
        assert node is not None
        slope = node.attributes.get_float("alpha", 0.2)
        middle = node.attributes.get_float("beta", 0.5)
        if abs(slope - SLOPE) > TOLERANCE * SLOPE or middle != MIDDLE:
            return result.fail("The slope must be 1/6 and the middle 1/2.", gate)
        if x.dtype not in (None, ir.DataType.FLOAT):
            return result.fail("x must be float.", x)
        return result

    def rewrite(self, op: Op, x: ir.Value, **_: object) -> ir.Value:
        """One HardSwish."""
        return self.named(op.HardSwish(x))


class HardSwishDiv(HardSigmoidDiv):
    """The product is divided (Paddle)."""

    def pattern(self, op: Op, x: Term, b: Term, low: Term, high: Term, d: Term) -> Term:
        """x · clip(x + 3, 0, 6) / 6"""
        return op.Div(op.Mul(x, op.Clip(op.Add(x, b), low, high)), d)

    rewrite = HardSwishMul.rewrite


class HardSwishMulMul(HardSigmoidMul):
    """The product is multiplied by 1/6."""

    def pattern(self, op: Op, x: Term, b: Term, low: Term, high: Term, d: Term) -> Term:
        """x · clip(x + 3, 0, 6) · ⅙"""
        return op.Mul(op.Mul(x, op.Clip(op.Add(x, b), low, high)), d)

    rewrite = HardSwishMul.rewrite


def numbers_of(scale: float) -> tuple[np.float32, np.float32]:
    """Shift and top of the same function of u = a·x: u · clip(u + 3a, 0, 6a) = 6a² · hardswish(x);
    ``scale``: a."""
    return np.float32(SHIFT * scale), np.float32(TOP * scale)


_sigmoids = fuse_with(HardSigmoidDiv, HardSigmoidMul)
_swishes = fuse_with(HardSwishDiv, HardSwishMulMul)
_gated = fuse_with(HardSwishMul)


def fuse_hard_swish(model: ir.Model) -> int:
    """Fuse every HardSwish; returns how many."""
    return _swishes(model) + _fuse_gated(model)


def _fuse_gated(model: ir.Model) -> int:
    _sigmoids(model)
    return _gated(model)
