"""How far a per-channel factor goes: the one with the least expected error of the product.

x W is computed as ((x - t) / f) Q (f W), both parts quantized: the activation per tensor,
step s = max_c r_c / f_c / (levels - 1) · 2, the weight per output column, step s_n = max_c
f_c |W_cn| / (2^(b-1) - 1). A rounding error is uniform, of variance step² / 12, so that the
error of the product has the power

    (Σ_c s² k_c² f_c² Σ_n W_cn²  +  Σ_n s_n² Σ_c Var[x_c] / f_c²) / 12

per token, where k_c is the number of equal parts that channel c is split into (1 if it is
not; s = max_c r_c / (k_c f_c) then): x W = Σ_k (x / k) W, so that a channel far above the others
stops stretching their step without a large row in the weight (outlier channel splitting, Zhao
et al., arXiv 1901.09504). Of a weight in blocks of rows s_n is a block's. The variance stands for
the second moment because the mean's part is corrected in the bias. Candidates are
f = r^a / w^b, w_c the largest weight of row c: RepQ-ViT (arXiv 2212.08254) is a = 1, b = 0;
SmoothQuant (arXiv 2211.10438) has a global a and b = 1 - a.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.calibration.robust import WIDTHS

Double = NDArray[np.float64]

RANGE_POWERS = np.linspace(0, 1, 11)
WEIGHT_POWERS = (0.0, 0.25, 0.5)
WORTH_COPIES = 1.0
"""dB of expected noise that further copies of channels must save."""
MULTIPLES = 63
"""What it costs that a block's steps are whole multiples of its column's: as much as codes of 7
bits for the whole column (of 127 and 31 levels to a side neither is better on both sample models).
"""
WIDEST = 2.0**12
"""The largest ratio between two factors of a tensor."""


@dataclass(frozen=True)
class Product:
    """A linear that reads the tensor: |W| [C, N] and its powers per row and bits."""

    magnitude: NDArray[np.float32]
    bits: int = 8
    rows: int = 0
    """Of a block with a step of its own, rows lying by their size; 0: a column has one step."""

    @cached_property
    def row_power(self) -> Double:
        """Σ_n W² per row, [C]."""
        return np.asarray(np.einsum("cn,cn->c", self.magnitude, self.magnitude, dtype=np.float64))

    def noise(self, factor: NDArray[np.float32], power: Double) -> float:
        """Σ s² p of the weight times ``factor`` [C], its rows counting ``power`` [C], with the
        steps s of columns, or of their blocks of rows, which are no finer than the column lets
        them."""
        scaled, top = self.magnitude * factor[:, None], (1 << (self.bits - 1)) - 1
        columns = scaled.max(axis=0).astype(np.float64)
        if not self.rows:
            return float(np.sum((columns / top) ** 2) * power.sum())
        order = np.argsort(-factor * np.sqrt(self.row_power), kind="stable")
        starts = np.arange(0, len(order), self.rows)
        steps = np.maximum.reduceat(scaled[order], starts, axis=0) / top
        squares = np.square(steps, dtype=np.float64) + np.square(columns / MULTIPLES)
        return float(np.add.reduceat(power[order], starts) @ squares.sum(axis=1))


@dataclass(frozen=True)
class Choice:
    """Factors [C] (geometric mean 1), copies [C], and the expected noise with and without."""

    factor: Double
    noise: float
    plain: float
    copies: NDArray[np.int64] | None = None
    exponent: float = 0.0
    """The power of the range that the factor follows."""

    @property
    def gain_db(self) -> float:
        """By how much the factors lower the expected noise; 0 where that is beyond numbers."""
        if not (np.isfinite(self.plain) and np.isfinite(self.noise)):
            return 0.0
        return float(10 * np.log10(max(self.plain, 1e-300) / max(self.noise, 1e-300)))


@dataclass(frozen=True)
class Records:
    """How far the largest image of each channel stands out, and of how many.

    ``ratio`` [C] is the largest per-image extreme over the second largest; ``images`` their
    number; ``values`` how many values a channel has in an image.
    """

    ratio: Double
    images: int
    values: float

    def clipping(self, reach: Double, weight: Double, bound: float, exponent: float) -> Double:
        """Expected noise power per token beyond ``WIDTHS`` times the bound, [W].

        Without its largest image a channel would have got a factor for the second largest: that
        image would have come out ratio^exponent times as large (see calibration/robust.py).
        ``reach`` [C] is what each channel takes of the bound, ``weight`` [C] its noise's weight.
        """
        out = reach * self.ratio**exponent
        over = np.maximum(out - bound * WIDTHS[:, None], 0) ** 2
        return np.asarray(over @ weight / ((self.images + 1) * self.values), np.float64)


def output_noise(
    factor: Double,
    half: Double,
    variance: Double,
    products: list[Product],
    levels: int,
    others: list[tuple[Double, float]] | None = None,
    copies: NDArray[np.int64] | None = None,
    records: Records | None = None,
    exponent: float = 0.0,
    limit: float = np.inf,
) -> float:
    """Expected noise power of the products for a factor [C]; see the module's text.

    The weights' part costs most: beyond ``limit`` it is left out, and what is returned is at
    least ``limit``. With ``records``, of the best range: wider than needed where unseen images
    would clip.

    ``half`` [C] is half the range of each channel, ``levels`` the number of codes. ``others``
    are half ranges of further tensors that carry the same factor and reach the same
    products, each with the weight of its noise (v, averaged by the attention).
    """
    whole = factor if copies is None else factor * copies
    power = np.sum([p.row_power for p in products], axis=0)
    spread = float(np.sum(whole**2 * power))
    steps = [(half, 1.0), *(others or [])]
    total = sum(
        share * (2 * float(np.max(one / whole)) / (levels - 1)) ** 2 * spread
        for one, share in steps
    )
    if records is not None and exponent:
        reach = half / whole
        clipped = records.clipping(reach, whole**2 * power, float(reach.max()), exponent)
        total = float(np.min(total * WIDTHS**2 + 12 * clipped))
    rest = variance / factor**2
    single = factor.astype(np.float32)
    for product in products:
        if total / 12 >= limit:
            break
        total += product.noise(single, rest)
    return total / 12


def choose_factor(
    half: Double,
    variance: Double,
    products: list[Product],
    levels: int,
    others: list[tuple[Double, float]] | None = None,
    extra: tuple[int, ...] = (),
    records: Records | None = None,
) -> Choice:
    """The candidate factor with the least expected noise; all ones is among them.

    A channel that never varies takes the part of the median channel. ``extra``: numbers of
    additional channels that may be spent on copies; each must lower the noise by
    ``WORTH_COPIES`` dB against the number before.
    """
    ranges = positive(np.max([half, *(o for o, _ in others or [])], axis=0))
    weights = positive(np.max([p.magnitude.max(axis=1) for p in products], axis=0))
    ones = np.ones(len(half))
    plain = output_noise(ones, half, variance, products, levels, others)
    best = Choice(ones, plain, plain)
    for number in (0, *extra):
        copies = spend(ranges, number) if number else None
        parts = ranges if copies is None else ranges / copies
        found = best
        for a in RANGE_POWERS:
            for b in WEIGHT_POWERS:
                factor = normalized(parts**a / weights**b)
                noise = output_noise(
                    factor,
                    half,
                    variance,
                    products,
                    levels,
                    others,
                    copies,
                    records,
                    float(a),
                    found.noise,
                )
                if noise < found.noise:
                    found = Choice(factor, noise, plain, copies, float(a))
        if not number or found.gain_db - best.gain_db >= WORTH_COPIES:
            best = found
    return best


def spend(ranges: Double, extra: int) -> NDArray[np.int64]:
    """Copies per channel [C], ``extra`` more than channels: the widest part is always split."""
    copies = np.ones(len(ranges), np.int64)
    level = np.sort(ranges)[::-1]
    low, high = 0.0, float(level[0])
    for _ in range(60):  # the width w at which Σ ceil(r / w) - C just fits
        middle = (low + high) / 2
        wanted = np.maximum(np.ceil(ranges / max(middle, 1e-300)), 1).sum() - len(ranges)
        low, high = (middle, high) if wanted > extra else (low, middle)
    copies = np.maximum(np.ceil(ranges / high), 1).astype(np.int64)
    rest = extra - int(copies.sum() - len(ranges))
    if rest > 0:
        copies[np.argmax(ranges / copies)] += rest
    return copies


def balance(
    half_q: Double, half_k: Double, power_q: Double, power_k: Double, levels: int
) -> Choice:
    """The factor that q is divided and k multiplied by, for the least noise in QKᵀ.

    Noise per logit: Σ_c s_q² f_c² E[k_c²] + s_k² E[q_c²] / f_c², up to 1/12. Sources as above.
    """
    ones = np.ones(len(half_q))

    def noise(f: Double) -> float:
        s_q, s_k = (half_q / f).max(), (half_k * f).max()
        both = s_q**2 * np.sum(f**2 * power_k) + s_k**2 * np.sum(power_q / f**2)
        return float(both) * (2 / (levels - 1)) ** 2 / 12

    plain = noise(ones)
    best = Choice(ones, plain, plain)
    ratio = positive(half_q) / positive(half_k)
    for a in RANGE_POWERS:
        factor = normalized(ratio ** (a / 2))
        found = noise(factor)
        if found < best.noise:
            best = Choice(factor, found, plain)
    return best


def normalized(factor: Double) -> Double:
    """Geometric mean 1, and no channel further than ``WIDEST`` from another."""
    logs = np.log2(factor)
    logs = np.maximum(logs, logs.max() - np.log2(WIDEST))
    return np.asarray(np.exp2(logs - logs.mean()), np.float64)


def positive(values: Double) -> Double:
    """Zeros replaced by the median of what is positive (1 where nothing is)."""
    usable = values[values > 0]
    middle = float(np.median(usable)) if usable.size else 1.0
    floor = middle / WIDEST
    return np.where(values > floor, values, np.where(values > 0, floor, middle))
