"""Searches for ranges, factors and scales against plain loops that try the same candidates."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from ptq_onnx.numerics.allocation import ERRORS, allocate, expected
from ptq_onnx.numerics.pair_sums import fitting, fitting_scale
from ptq_onnx.numerics.ptf import Factors, Reader, find_factors, output_noise, searched_factors
from ptq_onnx.numerics.range_search import channel_bounds, logarithmic_range, rates, share_rate
from ptq_onnx.numerics.rotations import even, hadamard

Array = NDArray[np.float64]


# --- ranges of few levels -----------------------------------------------------------------------


def slow_bounds(x: Array, levels: int) -> list[float]:
    """Each end at 14 parts of the way from the mean to the extreme, down to 0.16; twice."""
    mean = float(x.mean())
    extremes = [float(x.min()) - mean, float(x.max()) - mean]
    ends, factors = [*extremes], [0.16 ** (k / 13) for k in range(14)]

    def error(low: float, high: float) -> float:
        step = (high - low) / (levels - 1)
        codes = np.clip(np.rint((x - mean - low) / step), 0, levels - 1)
        return float(((codes * step + low - (x - mean)) ** 2).sum())

    for _ in range(2):
        for index in (0, 1):
            tried = [[*ends] for _ in factors]
            for one, factor in zip(tried, factors, strict=True):
                one[index] = extremes[index] * factor
            ends = min(tried, key=lambda pair: error(*pair))
    return [end + mean for end in ends]


@pytest.mark.parametrize("levels", [4, 8, 16])
def test_bounds_are_the_best_of_what_is_tried(levels: int) -> None:
    """More channels than are searched at a time; none of them around zero."""
    random = np.random.default_rng(levels)
    rows = random.standard_t(3, (300, 18)) * np.linspace(0.1, 4, 18) + np.linspace(-3, 5, 18)
    low, high = channel_bounds(rows.astype(np.float32), levels)
    inside = 0
    for c in range(18):
        ends = slow_bounds(rows[:, c].astype(np.float32).astype(float), levels)
        assert (low[c], high[c]) == pytest.approx(ends, rel=1e-5, abs=1e-5)
        inside += rows[:, c].min() < ends[0] - 1e-3
        inside += rows[:, c].max() > ends[1] + 1e-3
    assert inside > 20


def slow_levels(scale: float, zero: int, eighths: int, bits: int) -> Array:
    """M 2^(-8 k / eighths), the last one 0, less that of the zero point."""
    top = 2**bits - 1
    found = np.array([2.0 ** (-8 * k / eighths) for k in range(top)] + [0.0])
    return scale * (found - found[zero])


def slow_candidates(x: Array, bits: int) -> Iterator[tuple[float, int, int]]:
    """Nine τ, twenty largest values down to a tenth, and zero points, sixteen or so, that put the
    least level at half the least value or below: the last one where there is none."""
    top, depth = 2**bits - 1, max(-float(x.min()), 0.0)
    taus = {round(8 * r * 2.0 ** (bits - 4)) for r in (0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4)}
    for eighths in sorted(min(max(tau, 1), 256) for tau in taus):
        for k in range(20):
            high = float(x.max()) * 0.1 ** (k / 19)
            zeros = [top]
            if depth > 1e-3 * high:
                unit = [2.0 ** (-8 * z / eighths) for z in range(top)]
                zeros = [z for z in range(1, top) if unit[z] * high / (1 - unit[z]) >= depth / 2]
            for zero in zeros[:: max(1, len(zeros) // 16)]:
                part = 0.0 if zero == top else 2.0 ** (-8 * zero / eighths)
                yield high / (1 - part), zero, eighths


@pytest.mark.parametrize(("bits", "shift"), [(3, 0.17), (4, 0.17), (4, 0.0), (5, 0.6)])
def test_a_logarithmic_range_is_the_best_of_what_is_tried(bits: int, shift: float) -> None:
    random = np.random.default_rng(bits)
    x = np.asarray(np.maximum(random.normal(size=150) * 2, -shift), np.float32)
    weight = random.uniform(0.1, 3, len(x))
    values = x.astype(float)

    def error(candidate: tuple[float, int, int]) -> float:
        levels = slow_levels(*candidate, bits)
        return float(weight @ np.min((values[:, None] - levels) ** 2, axis=1))

    found = logarithmic_range(x, weight, bits)
    mine = (float(found.scale[0]), int(found.zero_point[0]), found.details["eighths"])
    best = min(slow_candidates(values, bits), key=error)
    assert error(mine) == pytest.approx(error(best), rel=1e-4)
    assert mine == pytest.approx(best, rel=1e-6)


def test_rates_grow_with_the_levels_and_stay_in_their_range() -> None:
    assert rates(4) == [6, 8, 10, 12, 14, 16, 20, 24, 32]
    assert rates(5) == [12, 16, 20, 24, 28, 32, 40, 48, 64]
    assert rates(1) == [1, 2, 3, 4]
    assert rates(8) == [96, 128, 160, 192, 224, 256]


@pytest.mark.parametrize("spread", [0.3, 2.0, 5.0])
def test_the_rate_of_a_map_is_the_best_of_all(spread: float) -> None:
    """Every entry the nearest level of its row's largest; the rows' sums divided out."""
    random = np.random.default_rng(5)
    attention = np.exp(random.normal(size=(2, 5, 12)) * spread)
    attention /= attention.sum(axis=-1, keepdims=True)
    values, errors = random.normal(size=(2, 12, 3)), {}
    for eighths in rates(3):
        grid = slow_levels(1.0, 7, eighths, 3)
        relative = attention / attention.max(axis=-1, keepdims=True)
        held = grid[np.abs(relative[..., None] - grid).argmin(axis=-1)]
        made = held @ values / held.sum(axis=-1, keepdims=True)
        errors[eighths] = float(((made - attention @ values) ** 2).sum())
    narrow = (attention.astype(np.float32), values.astype(np.float32))
    assert share_rate(*narrow, 3) == min(errors, key=lambda e: errors[e])


# --- factors of channels ------------------------------------------------------------------------


def slow_zeros(low: Array, high: Array, limits: tuple[int, int]) -> list[int]:
    """Of the whole range, of the channels' median, and the middle; each rounded both ways."""
    least, most = limits
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    picks = [least - low.min() / (high.max() - low.min()) * (most - least)]
    picks += [float(np.median(least - low / (high - low) * (most - least)))]
    picks += [(least + most + 1) / 2]
    both = {f(pick) for pick in picks for f in (math.floor, math.ceil)}
    return sorted({min(max(zero, least), most) for zero in both})


def slow_steps(low: Array, high: Array, zero: int, limits: tuple[int, int]) -> list[float]:
    above, below = max(limits[1] - zero, 1e-9), max(zero - limits[0], 1e-9)
    ends = zip(low.tolist(), high.tolist(), strict=True)
    return [max(max(h, 0) / above, max(-lo, 0) / below) for lo, h in ends]


@pytest.mark.parametrize("max_k", [None, 0, 2])
@pytest.mark.parametrize("read", [True, False])
def test_factors_are_the_best_of_what_is_tried(max_k: int | None, read: bool) -> None:
    """Nine strengths with a reader, two without, four offsets; the smallest K within 2 %."""
    limits, most = (0, 255), 12 if max_k is None else max_k
    for seed in range(4):
        random = np.random.default_rng(seed)
        high = 2.0 ** random.uniform(-6, 6, 9)
        low = -high * random.uniform(0, 1.5, 9)
        weight = random.normal(size=(9, 5)).astype(np.float32)
        reader = Reader.of(weight, high**2 / 3, bits=4) if read else None
        found: list[Factors] = []
        for zero in slow_zeros(low, high, limits):
            steps = np.array(slow_steps(low, high, zero, limits))
            for strength in (k / 8 for k in (range(9) if read else (0, 8))):
                for offset in (0, 0.25, 0.5, 0.75):
                    raised = [
                        math.floor(strength * math.log2(s / steps.max()) + offset + 1e-9)
                        for s in steps
                    ]
                    raised = [max(r - max(raised) + most, 0) for r in raised]
                    alpha = np.array([r - min(raised) for r in raised], np.int32)
                    scale = float((steps / 2.0**alpha).max())
                    noise = output_noise(scale * 2.0**alpha, alpha, reader)
                    found.append(Factors(scale, zero, alpha, noise))
        least = min(one.noise for one in found)
        enough = [one for one in found if one.noise <= 1.02 * least]
        best = min(enough, key=lambda one: (int(one.alpha.max()), one.noise))
        mine = find_factors(low, high, limits, max_k=max_k, reader=reader)  # type: ignore[arg-type]
        assert (mine.scale, mine.noise) == pytest.approx((best.scale, best.noise), rel=1e-9)
        assert (mine.zero_point, mine.alpha.tolist()) == (best.zero_point, best.alpha.tolist())


@pytest.mark.parametrize("max_k", [None, 1])
@pytest.mark.parametrize("limits", [(0, 255), (0, 15), (-8, 7)])
def test_searched_factors_are_the_best_of_what_is_tried(
    limits: tuple[int, int], max_k: int | None
) -> None:
    """Nine steps of every channel, halved each time from the one that covers it all."""
    random = np.random.default_rng(1)
    rows = random.standard_t(3, (60, 5)) * np.array([1, 0.2, 9, 0.01, 3]) + [0, 0.1, 0, 0, 5]
    power, counts = random.uniform(0.1, 1, 60), random.uniform(0.5, 2, 5)
    low, high = rows.min(axis=0), rows.max(axis=0)
    most, best = 12 if max_k is None else max_k, (math.inf, 0.0, 0, [0])
    for zero in slow_zeros(low, high, limits):
        need = slow_steps(low, high, zero, limits)
        for offset in (0, 0.25, 0.5, 0.75):
            top, depths, lost = max(need) * 2**offset, [], []
            for c, step in enumerate(need):
                first = min(math.floor(math.log2(top / step) + 1e-9), most)
                errors = []
                for depth in range(first, first + 9):
                    s = top / 2.0**depth
                    held = (np.clip(np.rint(rows[:, c] / s) + zero, *limits) - zero) * s
                    errors.append(float(power @ (rows[:, c] - held) ** 2))
                depths.append(first + int(np.argmin(errors)))
                lost.append(min(errors))
            kept = [min(d, min(depths) + most) for d in depths]
            noise = [n * 4.0 ** (d - k) for n, d, k in zip(lost, depths, kept, strict=True)]
            total = float(np.dot(noise, counts))
            if total < best[0] * (1 - 1e-12):
                alpha = [max(kept) - k for k in kept]
                best = (total, top / 2.0 ** max(kept), zero, alpha)
    found, noise_of = searched_factors(rows, power, limits, max_k, counts)
    assert (found.noise, found.scale) == pytest.approx(best[:2], rel=1e-9)
    assert (found.zero_point, found.alpha.tolist()) == best[2:]
    assert float(noise_of @ counts) == pytest.approx(found.noise)


# --- scales whose pairs of products fit ---------------------------------------------------------


def slow_fit(column: list[float], scale: np.float32) -> np.float32:
    """By what the worst pair of codes of one sign is above 128, again until none is."""
    found = scale
    while True:
        codes = [int(np.clip(np.rint(np.float32(w) / found), -128, 127)) for w in column] + [0]
        pairs = [codes[k : k + 2] for k in range(0, len(column), 2)]
        worst = max(max(sum(c for c in p if c > 0), -sum(c for c in p if c < 0)) for p in pairs)
        if worst <= 128:
            return found
        found = np.float32(found * max(worst / 128, 1 + 2.0**-10))


@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_scales_grow_as_much_as_their_pairs_need(rows: int) -> None:
    weight = np.random.default_rng(rows).standard_normal((rows, 30)).astype(np.float32)
    plain = np.asarray(np.abs(weight).max(axis=0) / 127, np.float32)
    found = fitting(weight, plain)
    slow = [slow_fit(weight[:, n].tolist(), plain[n]) for n in range(30)]
    np.testing.assert_allclose(found, slow, rtol=1e-6)
    np.testing.assert_array_equal(fitting_scale(weight, 1, plain), found)
    assert (found > plain).any() == (rows > 1)


def test_a_convolution_has_a_127th_for_a_64th() -> None:
    weight, scale = np.ones((2, 3, 2), np.float32), np.float32([1, 64])
    np.testing.assert_array_equal(fitting_scale(weight, 1, scale), [127 / 64, 127])
    np.testing.assert_array_equal(fitting_scale(weight[0], 0, scale), [127 / 64, 127])


# --- bits ---------------------------------------------------------------------------------------


def test_every_bit_takes_two_thirds_of_the_noise_or_more() -> None:
    """Never the 3/4 that uniform values would lose, and ever nearer to it."""
    parts = expected(np.ones(1), [2], range(2, 9))[0]
    left = parts[1:] / parts[:-1]
    assert (np.diff(left) < 0).all()
    assert 0.28 < left[-1] < left[0] < 0.32
    assert list(ERRORS) == list(range(2, 9))


def test_parts_that_cost_the_same_whatever_they_have() -> None:
    """Nothing to search: the least noise of each, and a budget of just that is enough."""
    noise, costs = np.array([[3.0, 1.0, 2.0], [0.5, 4.0, 1.0]]), np.full((2, 3), 5)
    assert allocate(noise, costs, 10).tolist() == [1, 0]


# --- rotations ----------------------------------------------------------------------------------


def test_columns_have_either_sign() -> None:
    """Those of a Hadamard matrix over √D, about half of them turned round, the first one not."""
    base = hadamard(96)
    assert base is not None
    sides = base.T @ even(96) / math.sqrt(96)
    np.testing.assert_allclose(np.abs(sides), np.eye(96), atol=1e-9)
    assert sides[0, 0] == pytest.approx(1)
    assert 30 < (np.diag(sides) < 0).sum() < 66
