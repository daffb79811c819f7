"""LayerNorm on PTF codes, in integers: FQ-ViT (arXiv 2111.13824, section 3.2), normalised first.

X = (x_q - z) ≪ α, [.., D], in units of the input's step s. Per row:

    V = D ΣX² - (ΣX)² = D² Var(X),  W = V + E,  E = max(1, round(D² ε / s²))
    k = #{j < 30 : W < 2^(60 - 2j)}, so that W 4^k lies in [2^60, 2^62)
    S = ⌊√(W 4^k)⌋, in [2^30, 2^31): S / 2^k is D σ to 30 bits
    M = ⌊2^(30 + b) / S⌋, N = 30 + b - k: 1 / (D σ) = M / 2^N, N found by comparison
    T = ⌊(D X - ΣX) M / 2^(N - f) + ½⌋: (X - μ)/σ with f = 20 fraction bits

and per channel y = requantize(T) with the multiplier γ / (s_out 2^f) and the constant β /
s_out + z. FQ-ViT takes M/2^N of γ/(σ s_out) per element with 8 bits; here the row's part has b
= 31 bits and the channel's part, which is constant, its own 31.

Exactness. D ΣX² ≤ D² max X², which is refused from 2^62 on (8-bit codes: |X| ≤ 255 · 2^12 < 2^20,
so up to D = 2047 whatever the factors; 16-bit codes: D = 768 up to factors of 2^5), so V is exact
in int64, and V ≥ 0 by Cauchy and Schwarz (it reaches 2^51 on a ViT-Ti). V ≤ D² span²
/ 4 (Popoviciu) with span = max X - min X. |D X - ΣX| ≤ D span, and b is taken smaller where
D span · 2^b would reach 2^61. |X - μ| / σ ≤ √(D - 1), so |T| ≤ 2^f √D + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ptq_onnx.errors import ModelError
from ptq_onnx.targets.integer.builder import I64, U64, Builder
from ptq_onnx.targets.integer.elementwise import Term
from ptq_onnx.targets.integer.fixed_point import BIAS_BITS, MULTIPLIER_BITS, FixedPoint, fixed_point
from ptq_onnx.targets.integer.grid import Double, Grid, Ints
from ptq_onnx.targets.integer.square_root import STEPS, integer_sqrt

RECIPROCAL_BITS = 31
"""Width b of M, the reciprocal of a row's deviation."""

FRACTION_BITS = 20
"""f: fraction bits of the normalised row."""

THRESHOLDS = np.array([1 << (60 - 2 * j) for j in range(30)], np.int64)


@dataclass(frozen=True, eq=False)
class LayerNormStep:
    """The constants of one LayerNorm over the last axis."""

    term: Term
    channels: int
    epsilon: int
    """E"""
    bits: int
    """b"""
    span: int
    """max X - min X"""
    finish: FixedPoint

    def __call__(self, codes: Ints) -> Ints:
        """Codes of the norm over the last axis."""
        return self.finish(self.normalised(self.term(codes)))

    def normalised(self, x: Ints) -> Ints:
        """T, the rows with mean 0 and deviation 1, in units of 2^-f."""
        total = x.sum(axis=-1, keepdims=True)
        squares = (x * x).sum(axis=-1, keepdims=True)
        w = self.channels * squares - total * total + self.epsilon
        k = (w < THRESHOLDS).sum(axis=-1, keepdims=True)
        root = integer_sqrt(w << 2 * k)
        m = (np.int64(1) << np.int64(30 + self.bits)) // root
        shift = 30 + self.bits - FRACTION_BITS - k
        half = np.int64(1) << (shift - 1)
        return np.asarray(((self.channels * x - total) * m + half) >> shift, np.int64)

    def emit(self, b: Builder, codes: ir.Value, name: str) -> ir.Value:
        """The same in ONNX, the sums in 64 bits; uint8 codes."""
        x = self.term.emit(b, codes)
        total = b.reduce("ReduceSum", x)
        squares = b.reduce("ReduceSum", b.op("Mul", [x, x], I64))
        scaled = b.op("Mul", [squares, b.number(self.channels)], I64)
        square = b.op("Mul", [total, total], I64)
        most = self.channels**2 * self.span**2 // 4
        spread = b.op("Sub", [scaled, square], I64, bounds=(0, most))
        w = b.op("Add", [spread, b.number(self.epsilon)], I64)
        below = b.op("Less", [w, b.number(THRESHOLDS)], ir.DataType.BOOL)
        k = b.reduce("ReduceSum", b.cast(below, I64))
        twice = b.cast(b.op("Mul", [k, b.number(2)], I64), U64)
        normal = b.shift(b.cast(w, U64), twice, "LEFT", bounds=(1 << 60, (1 << 62) - 1))
        root = emit_root(b, b.cast(normal, I64))
        m = b.op("Div", [b.number(1 << (30 + self.bits)), root], I64)
        centred = b.op("Sub", [b.op("Mul", [x, b.number(self.channels)], I64), total], I64)
        product = b.op("Mul", [centred, m], I64)
        amount = b.op("Sub", [b.number(30 + self.bits - FRACTION_BITS), k], I64)
        shift = b.cast(amount, U64)
        less = b.cast(b.op("Sub", [amount, b.number(1)], I64), U64)
        half = b.cast(b.shift(b.number(1, U64), less, "LEFT"), I64)
        bias = b.number(1 << BIAS_BITS)
        lifted = b.op("Add", [product, b.op("Add", [half, bias], I64)], I64)
        shifted = b.cast(b.shift(b.cast(lifted, U64), shift), I64)
        lowered = b.cast(b.shift(b.number(1 << BIAS_BITS, U64), shift), I64)
        bound = largest(self.channels)
        t = b.op("Sub", [shifted, lowered], I64, bounds=(-bound, bound))
        return self.finish.emit(b, t, name=name)


def emit_root(b: Builder, w: ir.Value) -> ir.Value:
    """The nodes of :func:`integer_sqrt`; see square_root.py for the argument."""
    top = b.cast(b.shift(b.cast(w, U64), b.number(30, U64)), I64)
    sum_ = b.op("Add", [top, b.number(9 << 28)], I64)
    x = b.op("Div", [sum_, b.number(3)], I64)
    within = (1 << 30, 35 * (1 << 31) // 32)  # √w and 1/12 more at most
    x = b.op("Add", [x, b.number(1)], I64, bounds=within)
    for _ in range(STEPS):
        quotient = b.op("Div", [w, x], I64)
        total = b.op("Add", [x, quotient], I64)
        x = b.op("Div", [total, b.number(2)], I64, bounds=within)
    above = b.op("Greater", [b.op("Mul", [x, x], I64), w], ir.DataType.BOOL)
    limits = (1 << 30, (1 << 31) - 1)
    return b.op("Sub", [x, b.cast(above, I64)], I64, bounds=limits)


def largest(channels: int) -> int:
    """The largest |T|: a row's value is at most √(D - 1) deviations from its mean.

    The relative error of M/2^N is below 2^-28, which one unit in 2^f √D covers twice.
    """
    return (math.isqrt(channels) + 1) << FRACTION_BITS


def layer_norm_step(
    where: str,
    term: Term,
    read: Grid,
    made: Grid,
    gamma: Double,
    beta: Double,
    epsilon: float,
    multiplier_bits: int = MULTIPLIER_BITS,
) -> LayerNormStep:
    """The constants of a LayerNorm with γ, β [D] between two grids. Raises ModelError."""
    channels = len(gamma)
    low = (read.low - read.zero) << term.alpha
    high = (read.high - read.zero) << term.alpha
    span = int(high.max()) - int(low.min())
    width = max(abs(int(high.max())), abs(int(low.min())))
    if channels**2 * width**2 >= 1 << 62:
        raise ModelError(
            f"Node '{where}' (LayerNormalization): {channels} channels with factors up to"
            f" 2^{int(term.alpha.max())} overflow 64 bits; use a smaller --ptf-k."
        )
    bits = min(RECIPROCAL_BITS, 61 - (channels * span).bit_length())
    unit = min(max(round(channels**2 * epsilon / read.step**2), 1), 1 << 58)
    finish = fixed_point(
        [gamma / made.scale / (1 << FRACTION_BITS)],
        beta / made.scale + made.zero,
        [largest(channels)],
        (made.low, made.high),
        multiplier_bits,
    )
    return LayerNormStep(term, channels, unit, bits, span, finish)
