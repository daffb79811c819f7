"""Gelu (erf and tanh form) and QuickGelu from their formulas.

The formula is compared as a polynomial in x and the inner function, so that every order of
the factors and every spelling of the constants is the same one.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from ptq_onnx.fusion.rule import Context, Op, Result, Rule, Term, fuse_with
from ptq_onnx.graph.formula import DOMAIN, Polynomial, is_polynomial, is_private, polynomial

ERF: Polynomial = {(1,): 1 / math.sqrt(2)}
TANH: Polynomial = {
    (1,): math.sqrt(2 / math.pi),
    (3,): math.sqrt(2 / math.pi) * 0.044715,
}
QUICK: Polynomial = {(1,): 1.702}

GELU: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
"""½x + ½x·f, with f the error function or the hyperbolic tangent."""

INNER = {"Erf": ("none", ERF), "Tanh": ("tanh", TANH)}

ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "Neg")


class _Gelu(Rule):
    """½·x·(1 + f(u)): erf with u = x/√2, or tanh with u = √(2/π)·(x + 0.044715·x³)."""

    def check(self, context: Context, **_: object) -> Result:
        result = self.begin(context)
        output = self.root.outputs[0]
        inner = [v for v in _arithmetic(output, 4) if _op_type(v) in INNER]
        if len(inner) != 1:
            return result.fail("No erf or tanh, or more than one, in the product.", output)
        activation = inner[0]
        if not is_private(activation):
            return result.fail("The inner function is read elsewhere.", activation)
        argument = _argument(activation)
        self.approximate, expected = INNER[_op_type(activation)]
        for x in _arithmetic(argument, 6):
            if is_polynomial(polynomial(argument, (x,)), expected) and is_polynomial(
                polynomial(output, (x, activation), is_root=True), GELU
            ):
                self.x = x
                return result
        return result.fail("Not Gelu's constants, or a part of it is read elsewhere.", activation)

    def rewrite(self, op: Op, **_: object) -> ir.Value:
        if self.approximate == "none":
            return self.named(op.Gelu(self.x))
        return self.named(op.Gelu(self.x, approximate=self.approximate))


class GeluMul(_Gelu):
    """The last operation is a product."""

    def pattern(self, op: Op, a: Term, b: Term) -> Term:
        """a · b, of which the polynomial tells what is GELU."""
        return op.Mul(a, b)


class GeluDiv(_Gelu):
    """The last operation is a division by two."""

    def pattern(self, op: Op, a: Term, b: Term) -> Term:
        """a / b"""
        return op.Div(a, b)


class GeluAdd(_Gelu):
    """The last operation is the sum ½x + ½x·f."""

    def pattern(self, op: Op, a: Term, b: Term) -> Term:
        """a + b"""
        return op.Add(a, b)


class QuickGelu(Rule):
    """x·sigmoid(1.702·x), as an op of ours: standard ONNX has none."""

    def pattern(self, op: Op, x: Term, u: Term) -> Term:
        """x · sigmoid(u)"""
        return op.Mul(x, op.Sigmoid(u))

    def check(self, context: Context, x: ir.Value, u: ir.Value) -> Result:
        """Fails unless u = 1.702 · x."""
        result = self.begin(context)
        if not is_polynomial(polynomial(u, (x,)), QUICK):
            return result.fail("The factor must be 1.702.", u)
        return result

    def rewrite(self, op: Op, x: ir.Value, **_: object) -> ir.Value:
        """One QuickGelu of our own domain."""
        return self.named(op.QuickGelu(x, _domain=DOMAIN, _version=1))


def _arithmetic(value: ir.Value | None, depth: int) -> list[ir.Value]:
    """Every value within the arithmetic behind ``value``, itself first, each once."""
    if value is None:
        return []
    node = value.producer()
    if node is None or depth == 0 or node.op_type not in ARITHMETIC:
        return [value]
    inner = (v for operand in node.inputs for v in _arithmetic(operand, depth - 1))
    return list(dict.fromkeys((value, *inner)))


def _argument(value: ir.Value) -> ir.Value | None:
    node = value.producer()
    return None if node is None else node.inputs[0]


def _op_type(value: ir.Value) -> str:
    node = value.producer()
    return "" if node is None else node.op_type


fuse_gelu = fuse_with(GeluMul, GeluDiv, GeluAdd)
fuse_quick_gelu = fuse_with(QuickGelu)
