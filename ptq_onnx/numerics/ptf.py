"""Power-of-Two Factor: one scale per tensor, one factor 2^α per channel.

x_q = clip(round(x / (2^α_c s)) + z, 0, 2^b - 1). Source: FQ-ViT, arXiv 2111.13824, section
3.2, which takes K = 3, s = range / (2^b - 1) / 2^K and α_c by squared error on one batch.

Here the step s 2^α_c of every channel covers that channel's range on all calibration
images, K grows where the channels need it, and s, z and α are chosen together to make the
rounding noise small: in the tensor itself, or, where the factor moves into the weight that
reads the tensor, in that product's output, the weight's own rounding included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.numerics.codes.code import TINY

Array = NDArray[np.float32]
Double = NDArray[np.float64]

STRENGTHS = np.linspace(0, 1, 9)
OFFSETS = np.linspace(0, 1, 4, endpoint=False)
MAX_K = 12
DEEPER = 9
"""Steps of a channel that are tried: the one that covers all, its half, …"""
ENOUGH = 1.02
"""K is the smallest whose noise is within this ratio of the best."""


@dataclass(frozen=True)
class Reader:
    """The products that read a tensor whose factor moves into their weights' rows.

    ``magnitude`` [C, N] is |W|, ``row_power`` [C] Σ_n W², ``second_moment`` [C] E[x²] of the
    tensor, ``bits`` those of the weights.
    """

    magnitude: Array
    row_power: Double
    second_moment: Double
    bits: int = 8

    @classmethod
    def of(cls, weight: Array, second_moment: Double, bits: int = 8) -> Reader:
        """The reader with weight [C, N] of a tensor with second moments [C]."""
        power = np.sum(weight.astype(np.float64) ** 2, axis=1)
        return cls(np.abs(weight).astype(np.float32), power, second_moment, bits)

    @classmethod
    def of_convolution(
        cls, weight: Array, groups: int, second_moment: Double, bits: int = 8
    ) -> Reader:
        """The reader with weight [N, C/groups, …] of a tensor with second moments [C].

        The Σ_c of the weight's own rounding runs over all A = Π(kernel) places of a channel, so
        |W| is the largest of them, times √A. With groups, a factor scales whole output channels:
        their rounding does not depend on it, and is left out.
        """
        outputs, inside = weight.shape[:2]
        places = np.abs(weight.reshape(outputs, inside, -1)).astype(np.float32)
        power = np.sum(places.astype(np.float64) ** 2, axis=2)
        power = power.reshape(groups, outputs // groups, inside).sum(axis=1).ravel()
        largest = places.max(axis=2).T * np.float32(np.sqrt(places.shape[2]))
        if groups > 1:
            largest = np.zeros((len(second_moment), 0), np.float32)
        return cls(largest, power, second_moment, bits)

    def beside(self, other: Reader) -> Reader:
        """Both read the tensor."""
        magnitude = np.concatenate([self.magnitude, other.magnitude], axis=1)
        power = self.row_power + other.row_power
        return Reader(magnitude, power, self.second_moment, self.bits)

    def passed_on(self) -> Reader:
        """Something else reads the tensor too, as it is: its rounding counts by itself."""
        return Reader(self.magnitude, self.row_power + 1, self.second_moment, self.bits)


@dataclass(frozen=True)
class Factors:
    """Scale, zero point and exponents (int32 [C], the smallest is 0), and the noise."""

    scale: float
    zero_point: int
    alpha: NDArray[np.int32]
    noise: float


def needed_step(low: Double, high: Double, zero: int, limits: tuple[int, int]) -> Double:
    """The smallest step per channel that covers [low, high] around zero point ``zero``."""
    smallest, largest = limits
    above = np.maximum(high, 0) / max(largest - zero, 1e-9)
    below = np.maximum(-low, 0) / max(zero - smallest, 1e-9)
    return np.maximum(np.maximum(above, below), TINY)


def zero_points(low: Double, high: Double, limits: tuple[int, int], symmetric: bool) -> list[int]:
    """Candidate zero points: the one of the whole tensor, of the median channel, the middle.

    Each rounded down and up: nothing may clip, so where one side of the range is a few levels
    only, a level less there would widen every step.
    """
    smallest, largest = limits
    if symmetric:
        return [0 if smallest < 0 else smallest]
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    span = np.maximum(high - low, TINY)
    ideal = smallest - low / span * (largest - smallest)
    whole = smallest - low.min() / max(high.max() - low.min(), TINY) * (largest - smallest)
    picks = (whole, float(np.median(ideal)), (smallest + largest + 1) / 2)
    ends = {end for pick in picks for end in (math.floor(pick), math.ceil(pick))}
    return sorted({min(max(end, smallest), largest) for end in ends})


def least_steps(
    low: Double, high: Double, limits: tuple[int, int], symmetric: bool
) -> tuple[int, Double]:
    """The zero point that all channels share with the least Σ step², and the steps [C] then."""
    found = {
        zero: needed_step(low, high, zero, limits)
        for zero in zero_points(low, high, limits, symmetric)
    }
    zero = min(found, key=lambda z: float(np.sum(found[z] ** 2)))
    return zero, found[zero]


def exponents(step: Double, strength: float, offset: float, max_k: int) -> NDArray[np.int32]:
    """α in [0, max_k] that follows the needed steps [C] with the given strength."""
    alpha = np.floor(strength * np.log2(step / step.max()) + offset + 1e-9)
    alpha = np.maximum(alpha - alpha.max() + max_k, 0)
    return np.asarray(alpha - alpha.min(), np.int32)


def output_noise(step: Double, alpha: NDArray[np.int32], reader: Reader | None) -> float:
    """Expected squared rounding error: of the tensor, or of the product that reads it.

    A rounding error is uniform in ±step/2: variance step²/12. With a reader: Σ_c step_c²
    |W_c|² / 12 from the tensor and Σ_n s_n² / 12 · Σ_c E[x_c²] 4^-α_c from the weight, whose
    step s_n is that of column n of W · 2^α.
    """
    if reader is None:
        return float(np.sum(step**2)) / 12
    factor = np.exp2(alpha.astype(np.float32))
    column = (reader.magnitude * factor[:, None]).max(axis=0) / ((1 << (reader.bits - 1)) - 1)
    column_sum = float(np.sum(column.astype(np.float64) ** 2))
    from_weight = column_sum * float(np.sum(reader.second_moment / factor.astype(np.float64) ** 2))
    from_tensor = float(np.sum(step**2 * reader.row_power))
    return (from_weight + from_tensor) / 12


def find_factors(
    low: Array,
    high: Array,
    limits: tuple[int, int],
    *,
    symmetric: bool = False,
    max_k: int | None = None,
    reader: Reader | None = None,
) -> Factors:
    """Scale, zero point and α for per-channel ranges [C] that are not to be clipped.

    ``max_k`` bounds K = max α; None: at most ``MAX_K``. Of all candidates whose noise is
    within ``ENOUGH`` of the least, the one with the smallest K is taken.
    """
    low64, high64 = low.astype(np.float64), high.astype(np.float64)
    limit = MAX_K if max_k is None else max_k
    strengths = STRENGTHS if reader is not None else STRENGTHS[[0, -1]]
    found: list[Factors] = []
    for zero in zero_points(low64, high64, limits, symmetric):
        step = needed_step(low64, high64, zero, limits)
        for strength in strengths if limit else STRENGTHS[:1]:
            for offset in OFFSETS if strength else OFFSETS[:1]:
                alpha = exponents(step, float(strength), float(offset), limit)
                factor = np.exp2(alpha.astype(np.float64))
                scale = float((step / factor).max())
                noise = output_noise(scale * factor, alpha, reader)
                found.append(Factors(scale, zero, alpha, noise))
    least = min(one.noise for one in found)
    enough = [one for one in found if one.noise <= least * ENOUGH]
    return min(enough, key=lambda one: (int(one.alpha.max()), one.noise))


def searched_factors(
    rows: Double,
    power: Double,
    limits: tuple[int, int],
    max_k: int | None = None,
    counts: Double | None = None,
) -> tuple[Factors, Double]:
    """Scale, zero point and α with the least Σ_r power_r (x - x̂)² in rows [R, C], and that per
    channel, [C].

    What few rows hold may be clipped where all others gain. ``counts`` [C]: how much a channel's
    error counts where scale and zero point, which all share, are chosen. The choice of α_c by
    squared error is the paper's; the weights are this project's.
    """
    each = np.ones(rows.shape[1]) if counts is None else counts
    low, high = np.minimum(rows.min(axis=0), 0), np.maximum(rows.max(axis=0), 0)
    limit = MAX_K if max_k is None else max_k
    best: tuple[Factors, Double] | None = None
    for zero in zero_points(low, high, limits, symmetric=False):
        need = needed_step(low, high, zero, limits)
        for offset in OFFSETS:
            top = float(need.max()) * 2.0**offset
            covering = np.minimum(np.floor(np.log2(top / need) + 1e-9), limit)
            tried = np.stack(
                [
                    _clipped_noise(rows, power, top * 2.0 ** -(covering + k), zero, limits)
                    for k in range(DEEPER)
                ]
            )
            depth = covering + tried.argmin(axis=0)
            kept = np.minimum(depth, depth.min() + limit)
            noise = tried.min(axis=0) * 4.0 ** (depth - kept)
            alpha = (kept.max() - kept).astype(np.int32)
            scale = top * 2.0 ** -float(kept.max())
            found = Factors(scale, zero, alpha, float(noise @ each))
            if best is None or found.noise < best[0].noise:
                best = found, noise
    assert best is not None
    return best


def _clipped_noise(
    rows: Double, power: Double, step: Double, zero: int, limits: tuple[int, int]
) -> Double:
    """Σ_r power_r (x - x̂)² per channel, [C], of steps [C] around a zero point."""
    codes = np.clip(np.rint(rows / step) + zero, *limits)
    return np.asarray(power @ (rows - (codes - zero) * step) ** 2, np.float64)
