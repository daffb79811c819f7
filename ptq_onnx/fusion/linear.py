"""Linear: x·W + b from MatMul + Add, a lone MatMul, or Gemm. W is a constant [K, N], b [N].

The op is ours (domain ``ptq_onnx``): inputs x, W and, where there is one, b.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ptq_onnx.fusion.rule import Context, Op, Result, Rule, Term, fuse_with
from ptq_onnx.graph.formula import DOMAIN, constant, new_constant, sizes


class MatMulAdd(Rule):
    """x·W + b, the bias on either side."""

    def pattern(self, op: Op, x: Term, w: Term, b: Term) -> Term:
        """x·W + b"""
        return op.Add(op.MatMul(x, w), b)

    def check(self, context: Context, x: ir.Value, w: ir.Value, b: ir.Value) -> Result:
        """Fails unless W is a constant [K, N], x is none, and b is a constant [N]."""
        result = self.begin(context)
        if not _is_weight(x, w):
            return result.fail("W must be a constant [K, N] and x must not.", w)
        if _vector(b) != _shape(w)[1]:
            return result.fail("The bias must be a constant [N].", b)
        return result

    def rewrite(self, op: Op, x: ir.Value, w: ir.Value, b: ir.Value) -> ir.Value:
        """One Linear with a bias."""
        return self.named(op.Linear(x, w, b, _domain=DOMAIN, _version=1))


class MatMul(Rule):
    """x·W"""

    def pattern(self, op: Op, x: Term, w: Term) -> Term:
        """x·W"""
        return op.MatMul(x, w)

    def check(self, context: Context, x: ir.Value, w: ir.Value) -> Result:
        """Fails unless W is a constant [K, N] and x is none."""
        result = self.begin(context)
        return result if _is_weight(x, w) else result.fail("W must be a constant [K, N].", w)

    def rewrite(self, op: Op, x: ir.Value, w: ir.Value) -> ir.Value:
        """One Linear without a bias."""
        return self.named(op.Linear(x, w, _domain=DOMAIN, _version=1))


class _Gemm(Rule):
    """x·W or x·Wᵀ, with or without b, factors 1; a transposed W becomes a new constant."""

    def check(
        self, context: Context, x: ir.Value, w: ir.Value, b: ir.Value | None = None
    ) -> Result:
        result = self.begin(context)
        attributes = self.root.attributes
        if attributes.get_int("transA", 0) or any(
            attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")
        ):
            return result.fail("Gemm needs transA = 0 and alpha = beta = 1.", self.root)
        if not _is_weight(x, w):
            return result.fail("W must be a constant matrix and x must not.", w)
        self.transposed = bool(attributes.get_int("transB", 0))
        size = _shape(w)[0 if self.transposed else 1]
        if b is not None and _vector(b) != size:
            return result.fail("The bias must be a constant [N].", b)
        return result

    def rewrite(self, op: Op, x: ir.Value, w: ir.Value, b: ir.Value | None = None) -> ir.Value:
        weight = _transpose(self.graph, w) if self.transposed else w
        inputs = (x, weight) if b is None else (x, weight, b)
        return self.named(op.Linear(*inputs, _domain=DOMAIN, _version=1))


class GemmAdd(_Gemm):
    """Gemm with a bias."""

    def pattern(self, op: Op, x: Term, w: Term, b: Term) -> Term:
        """A Gemm with a bias."""
        return op.Gemm(x, w, b, _allow_other_attributes=True)


class Gemm(_Gemm):
    """Gemm with two inputs."""

    def pattern(self, op: Op, x: Term, w: Term) -> Term:
        """A Gemm without a bias."""
        return op.Gemm(x, w, _allow_other_attributes=True)


def _is_weight(x: ir.Value, w: ir.Value) -> bool:
    """True for a constant float matrix that multiplies an activation of two axes or more."""
    array, dims = constant(w), sizes(x)
    if array is None or constant(x) is not None or dims is None:
        return False
    return array.ndim == 2 and array.dtype == np.float32 and len(dims) >= 2


def _shape(value: ir.Value) -> tuple[int, ...]:
    array = constant(value)
    return () if array is None else array.shape


def _vector(value: ir.Value) -> int | None:
    """The length of a constant float vector; None for anything else."""
    array = constant(value)
    return None if array is None or array.ndim != 1 else array.size


def _transpose(graph: ir.Graph, w: ir.Value) -> ir.Value:
    """Wᵀ as an initializer; nodes that share W share this one too."""
    array = constant(w)
    assert array is not None
    existing = graph.initializers.get(f"{w.name}_transposed")
    known = constant(existing)
    if existing is not None and known is not None and np.array_equal(known, array.T):
        return existing
    return new_constant(graph, f"{w.name}_transposed", np.ascontiguousarray(array.T))


_fuse_biased = fuse_with(MatMulAdd, GemmAdd, Gemm)
_fuse_bare = fuse_with(MatMul)


def fuse_linear(model: ir.Model) -> int:
    """Fuse all products with a constant matrix; returns how many."""
    return _fuse_biased(model) + _fuse_bare(model)
