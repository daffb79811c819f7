"""Softmax in integers, to log2 codes (FQ-ViT's Log-Int-Softmax) or to uniform codes, of the values
or of their shares of the row's largest.

The exponential is I-BERT's (arXiv 2101.01321, algorithm 2), written with d = max - code ≥ 0,
so that all of it is unsigned 32-bit. The grid is made finer by f bits, until its unit u = s /
2^f lies in [2^-14, 2^-13):

    p = d ≪ f,  q = ⌊p / ⌊ln2/u⌋⌋,  r = p - q ⌊ln2/u⌋,  e = (⌊c/u²⌋ - r (⌊b/u⌋ - r)) ≫ (h + q)

which is a^-1 u^-2 exp(-p u) in steps of 2^h, a = 0.35815147. h brings ⌊c/u²⌋ to E bits, E =
min(22, 29 - ⌈log2 tokens⌉), so that the sum of a row fits.

Bounds. f ≤ 21, so p ≤ 255 · 2^21 < 2^29; ⌊c/u²⌋ < 2.8 · 2^28 < 2^30; r (⌊b/u⌋ - r) ≤ ln2 (b -
ln2) 2^28 < 1.4 · 2^28, so that every product fits uint32; Σe < 2^29, and 2 Σe + e < 2^31 fits
int32.

t = round(Σe / e_i) by integer division, and the code is the number of j ≤ L with 2 t ≥ 3 · 2^j:
⌊log2 t⌋, one more from t ≥ 1.5 · 2^⌊log2 t⌋ on. Codes 0 … L stand for 2^-code, code L + 1 for
zero: L = 14 with 4 bits (2^b - 2), E - 2 with 8 (19 for 197 tokens). e_i = 0 gives t = Σe ≥
2^(E-1), which is beyond L.

Logits that a mask shuts out come as the code -1 (``MaskStep``): they take the code 0, no larger
than that of any other, and their exponential is multiplied by 0. No row is shut out as a whole, so
that the largest code is that of a logit that is not, and Σe ≥ ē all the same.

Shares: the row's largest exponential is that of d = 0, ē = ⌊c/u²⌋ ≫ h < 2^E for every row, so that
round((2^b - 1) e / ē) divides by a constant, and (2^(b+1) - 2) e + ē < 2^31 fits int32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from ptq_onnx.targets.integer.builder import BOOL, I32, I64, U8, U32, Builder
from ptq_onnx.targets.integer.grid import Ints

EXP_B, EXP_C = 2.70732486, 2.79212144
"""exp(r) ≈ a (r² + b r + c) on (-ln 2, 0], a = 0.35815147 (I-BERT: a (r + 1.353)² + 0.344)."""

EXP_BITS = 22
"""Most bits of an exponential."""

UNIT_BITS = 14
"""The finer grid's unit is at least 2^-14, and below 2^-13."""

LARGEST_SCALE = 2.0**8
"""A step of 256 leaves nothing but the maximum, as any larger one would."""


Kind = Literal["log2", "uniform", "shares"]
"""What the codes are of."""


@dataclass(frozen=True)
class SoftmaxStep:
    """The constants of one softmax over codes of scale ``scale``, rows of ``tokens``."""

    scale: float
    tokens: int
    bits: int
    kind: Kind
    span: int = 255
    """Largest difference of two codes."""
    masked: bool = False
    """Codes of -1 are shut out."""

    @property
    def fraction(self) -> int:
        """f, 0 to 21."""
        scale = min(self.scale, LARGEST_SCALE * (1 - 2.0**-20))
        return max(math.floor(math.log2(scale)) + UNIT_BITS, 0)

    @property
    def unit(self) -> float:
        """u. A scale below 2^-14 is taken as 2^-14: a row's logits then differ by less than
        1/64, and so little more that no code changes by it."""
        return float(min(max(self.scale, 2.0**-UNIT_BITS), LARGEST_SCALE) / (1 << self.fraction))

    @property
    def constants(self) -> tuple[int, int, int]:
        """⌊ln2/u⌋, ⌊b/u⌋, ⌊c/u²⌋."""
        u = self.unit
        return math.floor(math.log(2) / u), math.floor(EXP_B / u), math.floor(EXP_C / u**2)

    @property
    def exp_bits(self) -> int:
        """E."""
        return min(EXP_BITS, 29 - math.ceil(math.log2(max(self.tokens, 2))))

    @property
    def down(self) -> int:
        """h."""
        return max(self.constants[2].bit_length() - self.exp_bits, 0)

    @property
    def top(self) -> int:
        """The largest uniform code."""
        return (1 << self.bits) - 1

    @property
    def largest(self) -> int:
        """ē."""
        return self.constants[2] >> self.down

    @property
    def last(self) -> int:
        """L, the code of the smallest value that is not zero."""
        return min((1 << self.bits) - 2, self.exp_bits - 2)

    @property
    def thresholds(self) -> list[int]:
        """The smallest t of each code from 1 on: ⌈1.5 · 2^j⌉, j = 0 … L."""
        return [-(-3 * (1 << j) // 2) for j in range(self.last + 1)]

    def exponentials(self, codes: Ints) -> Ints:
        """e of codes [.., N], below 2^E."""
        ln2, b, c = self.constants
        codes, open_ = (np.maximum(codes, 0), codes >= 0) if self.masked else (codes, np.True_)
        p = (codes.max(axis=-1, keepdims=True) - codes) << self.fraction
        q = p // ln2
        r = p - q * ln2
        return np.asarray((c - r * (b - r)) >> np.minimum(q + self.down, 31), np.int64) * open_

    def __call__(self, codes: Ints) -> Ints:
        """Codes of softmax over the last axis: log2 codes, round(top · e / Σe), round(top · e /
        ē)."""
        e = self.exponentials(codes)
        if self.kind == "shares":
            return (2 * self.top * e + self.largest) // (2 * self.largest)
        total = e.sum(axis=-1, keepdims=True)
        if self.kind == "uniform":
            found = (2 * self.top * e + total) // (2 * total)
            return np.asarray(np.minimum(found, self.top), np.int64)
        safe = np.maximum(e, 1)
        t = (2 * total + safe) // (2 * safe)
        return np.asarray(np.searchsorted(self.thresholds, t, side="right"), np.int64)

    def emit(self, b: Builder, codes: ir.Value, name: str) -> ir.Value:
        """The same in ONNX, the exponentials in 32 bits; uint8 codes."""
        ln2, bb, c = self.constants
        open_ = None
        if self.masked:
            open_ = b.cast(b.op("Greater", [codes, b.number(-1, I32)], BOOL), I32)
            codes = b.cast(b.op("Max", [codes, b.number(0, I32)], I32), U8)
        top = b.reduce("ReduceMax", codes)
        d = b.op("Sub", [top, codes], U8, bounds=(0, self.span))
        p = b.shift(b.cast(d, U32), b.number(self.fraction, U32), "LEFT")
        q = b.op("Div", [p, b.number(ln2, U32)], U32)
        whole = b.op("Mul", [q, b.number(ln2, U32)], U32)
        r = b.op("Sub", [p, whole], U32, bounds=(0, ln2 - 1))
        rest = b.op("Mul", [r, b.op("Sub", [b.number(bb, U32), r], U32)], U32)
        value = b.op("Sub", [b.number(c, U32), rest], U32)
        amount = b.op("Add", [q, b.number(self.down, U32)], U32) if self.down else q
        amount = b.op("Min", [amount, b.number(31, U32)], U32)
        e = b.cast(b.shift(value, amount, bounds=(0, self.largest)), I32)
        if open_ is not None:
            e = b.op("Mul", [e, open_], I32)
        if self.kind == "shares":
            return self.shares(b, e, name)
        total = b.reduce("ReduceSum", e, bounds=(self.largest, self.tokens * self.largest))
        if self.kind == "uniform":
            return self.uniform(b, e, total, name)
        safe = b.op("Max", [e, b.number(1, I32)], I32)
        twice = b.op("Mul", [total, b.number(2, I32)], I32)
        above = b.op("Add", [twice, safe], I32)
        t = b.op("Div", [above, b.op("Mul", [safe, b.number(2, I32)], I32)], I32)
        code: ir.Value | None = None
        for index, threshold in enumerate(self.thresholds):
            at_least = b.op("GreaterOrEqual", [t, b.number(threshold, I32)], BOOL)
            one = b.cast(at_least, U8)
            label = name if index == self.last else ""
            code = one if code is None else b.op("Add", [code, one], U8, name=label)
        assert code is not None
        return code

    def uniform(self, b: Builder, e: ir.Value, total: ir.Value, name: str) -> ir.Value:
        """round(e (2^b - 1) / Σe), half up, in int64."""
        wide, sum_ = b.cast(e, I64), b.cast(total, I64)
        above = b.op("Add", [b.op("Mul", [wide, b.number(2 * self.top)], I64), sum_], I64)
        twice = b.op("Mul", [sum_, b.number(2)], I64)
        code = b.op("Div", [above, twice], I64, bounds=(0, self.top))
        return b.cast(code, U8, name=name)

    def shares(self, b: Builder, e: ir.Value, name: str) -> ir.Value:
        """round(e (2^b - 1) / ē), half up, in int32."""
        scaled = b.op("Mul", [e, b.number(2 * self.top, I32)], I32)
        above = b.op("Add", [scaled, b.number(self.largest, I32)], I32)
        code = b.op("Div", [above, b.number(2 * self.largest, I32)], I32, bounds=(0, self.top))
        return b.cast(code, U8, name=name)
