"""A · V from log2 codes: Σ_j (V_j - z_v) ≪ (L - code_j), divided by Σ_j 2^(L - code_j).

The weights w = 2^L ≫ code are 0 for code L + 1. Products of uint8 compute the sum of shifts
faster than BitShift would (a ViT-Ti's 3 · 197 · 197 · 64 shifts are 7.5 million int64 elements):
w is cut into bytes, w = Σ_i 2^(8i) w_i, and Σ_j w_j (V_j - z_v) = Σ_i 2^(8i) w_i (V - z_v) with
each product exact in int32 (tokens · 255 · 255 < 2^31 for fewer than 33,000 tokens). L is 14
with 4 bits (two bytes), about 19 with 8 (three).

The row's levels do not sum to one, so the sum is divided by theirs, R = max(Σ w, 1): a =
round(acc 2^16 / R), half up. |acc| ≤ 255 R since |V - z_v| ≤ 255, so that acc 2^16 + 255·2^16
R + ... is made positive by R 2^24 (ONNX's Div truncates towards zero), and stays below 2^55.
"""

from __future__ import annotations

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
class AttentionStep:
    """Constants of one product of log2 codes and values."""

    last: int
    """L"""
    zero: int
    """z_v"""
    tokens: int
    finish: FixedPoint

    def __call__(self, codes: Ints, values: Ints) -> Ints:
        """Codes of A·V from log2 codes of A [..., N, N] and codes of V [..., N, D], divided by the
        sums of A's rows."""
        w = np.int64(1 << self.last) >> codes
        acc = matmul(w, values - self.zero)
        rows = np.maximum(w.sum(axis=-1, keepdims=True), 1)
        a = ((acc << QUOTIENT_BITS) + (rows >> 1)) // rows
        return self.finish(a)

    def emit(self, b: Builder, codes: ir.Value, values: ir.Value, name: str) -> ir.Value:
        """The same in ONNX, A's shifts cut into bytes for MatMulInteger; uint8 codes."""
        w = b.shift(b.number(1 << self.last, U32), b.cast(codes, U32))
        zeros = [b.number(0, U8), b.number(self.zero, U8)]
        acc: ir.Value | None = None
        for i in range(self.last // 8 + 1):
            byte = b.shift(w, b.number(8 * i, U32)) if i else w
            if i < self.last // 8:
                byte = b.op("BitwiseAnd", [byte, b.number(255, U32)], U32)
            part = b.op("MatMulInteger", [b.cast(byte, U8), values, *zeros], I32)
            part = b.cast(part, I64)
            if i:
                part = b.op("Mul", [part, b.number(1 << (8 * i))], I64)
            acc = part if acc is None else b.op("Add", [acc, part], I64)
        assert acc is not None
        most = self.tokens << self.last
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
