"""A · V from the codes of a map, Σ_j w_j (V_j - z_v) / Σ_j w_j, w being what the codes stand for.

Log2 codes: w = 2^L ≫ code, 0 for code L + 1. Products of uint8 compute the sum of shifts
faster than BitShift would (a ViT-Ti's 3 · 197 · 197 · 64 shifts are 7.5 million int64 elements):
w is cut into bytes, w = Σ_i 2^(8i) w_i, and Σ_j w_j (V_j - z_v) = Σ_i 2^(8i) w_i (V - z_v) with
each product exact in int32 (tokens · 255 · 255 < 2^31 for fewer than 33,000 tokens). L is 14
with 4 bits (two bytes), about 19 with 8 (three).

Uniform codes of shares of the row's largest value: w is the code, one product.

The rows do not sum to one, so the sum is divided by theirs, R = max(Σ w, 1): a =
round(acc 2^16 / R), half up. |acc| ≤ 255 R since |V - z_v| ≤ 255, so that acc 2^16 + 255·2^16
R + ... is made positive by R 2^24 (ONNX's Div truncates towards zero), and stays below 2^55.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ptq_onnx.targets.integer.builder import I32, I64, U8, U32, Builder
from ptq_onnx.targets.integer.fixed_point import FixedPoint
from ptq_onnx.targets.integer.grid import Ints
from ptq_onnx.targets.integer.products import matmul

QUOTIENT_BITS = 16
"""Fraction bits of a: the quotient is off by 2^-17 of a step of V."""


@dataclass(frozen=True, eq=False)
class AttentionStep(ABC):
    """Constants of one product of a map's codes and values."""

    top: int
    """The largest w."""
    zero: int
    """z_v"""
    tokens: int
    finish: FixedPoint

    @abstractmethod
    def weights(self, codes: Ints) -> Ints:
        """w of codes, any shape."""

    @abstractmethod
    def emit_sums(self, b: Builder, codes: ir.Value, values: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Nodes that compute w, and Σ_j w_j (V_j - z_v) in int64."""

    def __call__(self, codes: Ints, values: Ints) -> Ints:
        """Codes of A·V from the codes of A [..., N, N] and of V [..., N, D], divided by the sums of
        A's rows."""
        w = self.weights(codes)
        acc = matmul(w, values - self.zero)
        rows = np.maximum(w.sum(axis=-1, keepdims=True), 1)
        a = ((acc << QUOTIENT_BITS) + (rows >> 1)) // rows
        return self.finish(a)

    def emit(self, b: Builder, codes: ir.Value, values: ir.Value, name: str) -> ir.Value:
        """The same in ONNX; uint8 codes."""
        w, acc = self.emit_sums(b, codes, values)
        most = self.tokens * self.top
        wide = I32 if most < 1 << 31 else I64
        rows = b.reduce("ReduceSum", b.cast(w, wide), bounds=(0, most))
        rows = b.op("Max", [b.cast(rows, I64), b.number(1)], I64)
        half = b.op("Div", [rows, b.number(2)], I64)
        lift = b.op("Mul", [rows, b.number(1 << (QUOTIENT_BITS + 8))], I64)
        lift = b.op("Add", [lift, half], I64)
        scaled = b.op("Mul", [acc, b.number(1 << QUOTIENT_BITS)], I64)
        positive = (1, (512 << QUOTIENT_BITS) * max(most, 1))
        numerator = b.op("Add", [scaled, lift], I64, bounds=positive)
        quotient = b.op("Div", [numerator, rows], I64, bounds=(0, 512 << QUOTIENT_BITS))
        bound = 256 << QUOTIENT_BITS
        a = b.op("Sub", [quotient, b.number(bound)], I64, bounds=(-bound, bound))
        return self.finish.emit(b, a, name=name)


class LogAttentionStep(AttentionStep):
    """Of log2 codes; ``top`` is 2^L."""

    def weights(self, codes: Ints) -> Ints:
        """2^L ≫ code."""
        return np.int64(self.top) >> codes

    def emit_sums(self, b: Builder, codes: ir.Value, values: ir.Value) -> tuple[ir.Value, ir.Value]:
        """A's shifts cut into bytes, each of which MatMulInteger takes."""
        w = b.shift(b.number(self.top, U32), b.cast(codes, U32))
        zeros = [b.number(0, U8), b.number(self.zero, U8)]
        acc: ir.Value | None = None
        last = self.top.bit_length() - 1
        for i in range(last // 8 + 1):
            byte = b.shift(w, b.number(8 * i, U32)) if i else w
            if i < last // 8:
                byte = b.op("BitwiseAnd", [byte, b.number(255, U32)], U32)
            part = b.op("MatMulInteger", [b.cast(byte, U8), values, *zeros], I32)
            part = b.cast(part, I64)
            if i:
                part = b.op("Mul", [part, b.number(1 << (8 * i))], I64)
            acc = part if acc is None else b.op("Add", [acc, part], I64)
        assert acc is not None
        return w, acc


class ShareAttentionStep(AttentionStep):
    """Of uniform codes of shares of the row's largest value; ``top`` is 2^b - 1."""

    def weights(self, codes: Ints) -> Ints:
        """The codes."""
        return codes

    def emit_sums(self, b: Builder, codes: ir.Value, values: ir.Value) -> tuple[ir.Value, ir.Value]:
        """One MatMulInteger."""
        zeros = [b.number(0, U8), b.number(self.zero, U8)]
        return codes, b.cast(b.op("MatMulInteger", [codes, values, *zeros], I32), I64)
