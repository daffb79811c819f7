"""Integer arithmetic for the inside of LayerNorm and softmax, as plain NumPy int64.

This is the reference, written from the formulas alone: FQ-ViT (arXiv 2111.13824, sections
3.2 and 3.3) for LayerNorm on PTF codes and Log-Int-Softmax, I-BERT (arXiv 2101.01321,
algorithm 2) for the exponential. The simulator computes the same with float64 tensors that
hold integers; a test holds both equal to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Double = NDArray[np.float64]

MULTIPLIER_BITS = 16
"""Width of M in M/2^N. FQ-ViT's 8 bits cost up to 0.8 % of a value; 16 cost 0.003 %."""

EXP_A, EXP_B, EXP_C = 0.35815147, 2.70732486, 2.79212144
"""exp(r) ≈ a (r² + b r + c) on (-ln 2, 0] (I-BERT: a (r + 1.353)² + 0.344)."""

EXP_FRACTION_BITS = 8
"""Extra bits of the logits' grid inside i-exp: at a scale near 0.2, ⌊ln 2 / s⌋ is too coarse."""

EXP_SHIFT = 24
"""exp is at most a·c/(s²) < 2^EXP_SHIFT after scaling, and exp ≫ q is exact for q ≤ 24."""


@dataclass(frozen=True)
class IntegerLayerNorm:
    """Constants of one integer LayerNorm: from codes to codes.

    y = clip(⌊(sign(A) M X + B) / 2^N + ½⌋ + z_out), A = γ / (σ s_out) in units of the input
    scale, N = clip(bits - 1 - ⌊log2 |A|⌋, 0, 31), M = ⌊|A| 2^N⌋, B = round((β - μ γ / σ)
    / s_out · 2^N). X = (x_q - z) ≪ α.
    """

    zero_point: int
    alpha: Ints
    """[C]; zeros where the input has one scale for all channels."""
    in_scale: float
    gamma: Double
    beta: Double
    epsilon: float
    out_scale: Double
    """Scalar, or [C] where the output has a factor per channel."""
    out_zero_point: int
    limits: tuple[int, int]
    bits: int = MULTIPLIER_BITS

    def __call__(self, codes: Ints) -> Ints:
        """Output codes of input codes [..., C]; both int64."""
        x = (codes - self.zero_point) << self.alpha
        channels = x.shape[-1]
        total = x.sum(axis=-1, keepdims=True)
        squares = (x * x).sum(axis=-1, keepdims=True)
        # D Σx² - (Σx)² in integers is D² times the variance; below 2^53 it is exact as float64.
        spread = channels * squares - total * total
        mean = total / channels
        sigma = np.sqrt(spread / (channels * channels) + self.epsilon / self.in_scale**2)
        a = self.gamma / (sigma * self.out_scale)
        n, m = multiplier(a, self.bits)
        b = np.rint((self.beta - mean * self.gamma / sigma) / self.out_scale * np.exp2(n))
        value = np.sign(a).astype(np.int64) * m * x + b.astype(np.int64)
        half = np.where(n > 0, np.int64(1) << np.maximum(n - 1, 0), 0)
        rounded = (value + half) >> n
        return np.asarray(np.clip(rounded + self.out_zero_point, *self.limits), np.int64)


def multiplier(a: Double, bits: int) -> tuple[Ints, Ints]:
    """(N, M) with |a| ≈ M / 2^N and M < 2^bits; M = 0 where a = 0."""
    magnitude = np.abs(a)
    # frexp: |a| = f 2^e, f in [½, 1), so ⌊log2 |a|⌋ = e - 1 exactly.
    _, exponent = np.frexp(magnitude)
    n = np.clip(bits - 1 - (exponent.astype(np.int64) - 1), 0, 31)
    m = np.minimum(np.floor(magnitude * np.exp2(n.astype(np.float64))), (1 << bits) - 1)
    return np.where(magnitude > 0, n, 0), m.astype(np.int64)


@dataclass(frozen=True)
class IntegerSoftmax:
    """Constants of one integer softmax on logits' codes of scale ``scale``.

    With s' = s / 2^f, f = ``EXP_FRACTION_BITS``: x = (codes - max) ≪ f, q = ⌊-x / ⌊ln 2/s'⌋⌋,
    r = x + q ⌊ln 2/s'⌋, e = (r (r + ⌊b/s'⌋) + ⌊c/s'²⌋) scaled to ``EXP_SHIFT`` bits, ≫ q.
    """

    scale: float
    bits: int
    log2: bool
    """Log2 codes (LIS); else uniform codes on [0, 1] with 2^bits - 1 levels."""

    @property
    def unit(self) -> float:
        """s', held where ⌊c/s'²⌋ is at least 2 and fits int64.

        Beyond either end nothing changes that could be seen: 255 steps of 2^-20 are 0.0002,
        and one step of 256 leaves nothing but the maximum.
        """
        return min(max(self.scale / (1 << EXP_FRACTION_BITS), 2.0**-28), 1.0)

    def exponentials(self, codes: Ints) -> Ints:
        """exp(x - max) as integers below 2^(EXP_SHIFT + 1), [..., N]."""
        unit = self.unit
        ln2 = max(math.floor(math.log(2) / unit), 1)
        b, c = math.floor(EXP_B / unit), math.floor(EXP_C / unit**2)
        x = (codes - codes.max(axis=-1, keepdims=True)) << EXP_FRACTION_BITS
        q = -x // ln2
        r = x + q * ln2
        e = r * (r + b) + c
        # c is the largest value; bring it to EXP_SHIFT bits by a shift, either way.
        down = max(c.bit_length() - EXP_SHIFT, 0)
        up = max(EXP_SHIFT - c.bit_length(), 0)
        e = (np.maximum(e, 0) >> down) << up
        return np.asarray(e >> np.minimum(q, 62), np.int64)

    def __call__(self, codes: Ints) -> Ints:
        """Codes of the attention map [..., N] from the codes of the logits."""
        e = self.exponentials(codes)
        total = e.sum(axis=-1, keepdims=True)
        top = (1 << self.bits) - 1
        if not self.log2:
            return np.asarray(np.minimum((2 * e * top + total) // (2 * total), top), np.int64)
        safe = np.maximum(e, 1)
        t = (2 * total + safe) // (2 * safe)
        k = floor_log2(t)
        code = k + (2 * t >= 3 * (np.int64(1) << k))
        limit = min(top, 126)
        return np.asarray(np.where(e == 0, limit, np.minimum(code, limit)), np.int64)


def floor_log2(t: Ints) -> Ints:
    """⌊log2 t⌋ of positive integers below 2^53, exactly."""
    _, exponent = np.frexp(t.astype(np.float64))
    return np.asarray(exponent.astype(np.int64) - 1, np.int64)
