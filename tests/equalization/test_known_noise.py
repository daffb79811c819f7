"""The expected noise of factors and copies, and the choice of them, by loops over channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from ptq_onnx.equalization.factor_search import (
    Choice,
    Product,
    Records,
    balance,
    choose_factor,
    normalized,
    output_noise,
    spend,
)

Array = NDArray[np.float64]
CHANNELS = 5


@dataclass(frozen=True)
class Case:
    """A tensor of five channels that two linears read, of 8 and of 4 bits."""

    half: Array
    variance: Array
    products: list[Product]
    other: Array
    records: Records


def case(seed: int) -> Case:
    random = np.random.default_rng(seed)
    weights = [
        (np.abs(random.normal(size=(CHANNELS, n))) * np.exp(random.normal(size=(CHANNELS, 1))), b)
        for n, b in ((3, 8), (4, 4))
    ]
    half = np.exp(random.normal(0, 1.5, CHANNELS))
    return Case(
        half,
        half**2 * random.uniform(0.1, 0.3, CHANNELS),
        [Product(w.astype(np.float32), bits) for w, bits in weights],
        np.exp(random.normal(0, 1, CHANNELS)),
        Records(random.uniform(1, 3, CHANNELS), 7, 11.0),
    )


def noise_of(
    one: Case,
    factor: Array,
    levels: int,
    *,
    other: float = 0.0,
    copies: Array | None = None,
    exponent: float = 0.0,
) -> float:
    """(Σ s² k² f² Σ W² + Σ s_n² Σ Var / f²) / 12, of the best of 25 ranges where records break."""
    k = np.ones(CHANNELS) if copies is None else copies
    rows = [sum(float((p.magnitude[c].astype(float) ** 2).sum()) for p in one.products)
            for c in range(CHANNELS)]  # fmt: skip
    spread = sum((k[c] * factor[c]) ** 2 * rows[c] for c in range(CHANNELS))
    parts = [(one.half, 1.0), (one.other, other)]
    rounding = 0.0
    for half, share in parts:
        widest = max(half[c] / (k[c] * factor[c]) for c in range(CHANNELS))
        rounding += share * (2 * widest / (levels - 1)) ** 2 * spread
    if exponent:
        reach = [one.half[c] / (k[c] * factor[c]) for c in range(CHANNELS)]
        found = []
        for step in range(25):
            width = 4 ** (step / 24)
            beyond = sum(
                max(reach[c] * one.records.ratio[c] ** exponent - max(reach) * width, 0) ** 2
                * (k[c] * factor[c]) ** 2 * rows[c]
                for c in range(CHANNELS)
            )  # fmt: skip
            found.append(rounding * width**2 + 12 * beyond / (8 * 11.0))
        rounding = min(found)
    for p in one.products:
        largest = 2 ** (p.bits - 1) - 1
        steps = [max(p.magnitude[c, n] * factor[c] for c in range(CHANNELS)) / largest
                 for n in range(p.magnitude.shape[1])]  # fmt: skip
        rounding += sum(s**2 for s in steps) * sum(
            one.variance[c] / factor[c] ** 2 for c in range(CHANNELS)
        )
    return float(rounding / 12)


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_the_formula(seed: int) -> None:
    one = case(seed)
    random = np.random.default_rng(seed + 50)
    factor = np.exp(random.normal(size=CHANNELS))
    copies = random.integers(1, 4, CHANNELS)
    plain = (factor, one.half, one.variance, one.products, 200)
    assert output_noise(*plain) == pytest.approx(noise_of(one, factor, 200), rel=1e-6)
    found = output_noise(*plain, others=[(one.other, 0.3)], copies=copies)
    expected = noise_of(one, factor, 200, other=0.3, copies=copies.astype(float))
    assert found == pytest.approx(expected, rel=1e-6)
    for exponent in (0.4, 1.0):
        found = output_noise(*plain, copies=copies, records=one.records, exponent=exponent)
        expected = noise_of(one, factor, 200, copies=copies.astype(float), exponent=exponent)
        assert found == pytest.approx(expected, rel=1e-6)
    found = output_noise(*plain, records=one.records)
    assert found == pytest.approx(noise_of(one, factor, 200), rel=1e-6)


def candidates(one: Case, ranges: Array) -> list[tuple[Array, float, float]]:
    """r^a / w^b of geometric mean 1, with a and b."""
    largest = np.max([p.magnitude.max(axis=1) for p in one.products], axis=0)
    found = []
    for tenth in range(11):
        for quarter in (0, 1, 2):
            raw = ranges ** (tenth / 10) / largest.astype(float) ** (quarter / 4)
            found.append((raw / math.prod(raw) ** (1 / len(raw)), tenth / 10, quarter / 4))
    return found


def test_the_choice_is_the_best_candidate() -> None:
    """Of eleven powers of the range and three of the weight, each of which is best for some."""
    powers, exponents = set(), set()
    for seed in range(40):
        one = case(seed)
        tried = candidates(one, np.maximum(one.half, one.other))
        noises = [
            noise_of(one, f, 256, other=0.3, exponent=a if seed % 2 else 0) for f, a, _ in tried
        ]
        best = int(np.argmin(noises))
        records = one.records if seed % 2 else None
        found = choose_factor(
            one.half, one.variance, one.products, 256, [(one.other, 0.3)], records=records
        )
        plain = noise_of(one, np.ones(CHANNELS), 256, other=0.3)
        assert found.plain == pytest.approx(plain, rel=1e-6)
        assert found.noise == pytest.approx(min(noises[best], plain), rel=1e-6)
        assert found.gain_db == pytest.approx(10 * math.log10(plain / found.noise), abs=1e-6)
        if noises[best] < 0.999 * plain:
            np.testing.assert_allclose(found.factor, tried[best][0], rtol=1e-6)
            assert found.exponent == pytest.approx(tried[best][1])
            powers.add(tried[best][2])
            exponents.add(round(tried[best][1], 1))
    assert powers == {0.0, 0.25, 0.5}
    assert len(exponents) >= 8


def test_copies_must_save_a_decibel_against_the_number_before() -> None:
    """Each number of copies with the best factor for what is left, the first that pays taken."""
    taken = set()
    for seed in range(40):
        one = case(seed)
        one.half[2] *= 1 + seed % 7
        best, best_copies = math.inf, 0
        plain = noise_of(one, np.ones(CHANNELS), 512)
        best = plain
        for number in (0, 2, 6):
            copies = spend(one.half, number) if number else np.ones(CHANNELS)
            tried = candidates(one, one.half / copies)
            least = min(noise_of(one, f, 512, copies=copies.astype(float)) for f, _, _ in tried)
            if not number:
                best = min(best, least)
            elif 10 * math.log10(best / min(least, best)) >= 1:
                best, best_copies = least, number
        found = choose_factor(one.half, one.variance, one.products, 512, extra=(2, 6))
        assert found.noise == pytest.approx(best, rel=1e-6)
        added = 0 if found.copies is None else int(found.copies.sum()) - CHANNELS
        assert added == best_copies
        taken.add(added)
    assert taken == {0, 2, 6}


def test_a_gain_beyond_numbers_is_none() -> None:
    one = np.ones(2)
    assert Choice(one, math.inf, 1.0).gain_db == 0
    assert Choice(one, 1.0, math.nan).gain_db == 0
    assert Choice(one, 0.1, 1.0).gain_db == pytest.approx(10)
    assert Choice(one, 0.0, 1e-290).gain_db == pytest.approx(100)
    assert Choice(one, 1e-290, 0.0).gain_db == pytest.approx(-100)


def test_channels_that_never_vary_take_the_median() -> None:
    """A range of zero counts as the middle one of the others, one of 1e-9 as the middle / 4096."""
    products = [Product(np.full((4, 2), 0.5, np.float32))]
    half = np.array([0.0, 1.0, 2.0, 8.0])
    found = choose_factor(half, np.full(4, 1e-12), products, 256)
    assert found.exponent > 0
    assert found.factor[0] == pytest.approx(found.factor[2])
    tiny = choose_factor(np.array([1e-9, 1.0, 2.0, 8.0]), np.full(4, 1e-12), products, 256)
    ratio = (tiny.factor[3] / tiny.factor[0]) ** (1 / tiny.exponent)
    assert ratio == pytest.approx(min(8 / (1.5 / 4096), 4096 ** (1 / tiny.exponent)), rel=1e-6)
    nothing = choose_factor(np.zeros(4), np.zeros(4), products, 256)
    np.testing.assert_array_equal(nothing.factor, 1)


@pytest.mark.parametrize("seed", range(5))
def test_the_widest_part_is_that_of_splitting_one_by_one(seed: int) -> None:
    ranges = np.exp(np.random.default_rng(seed).normal(0, 2, 9))
    copies = np.ones(9)
    for extra in range(1, 30):
        copies[np.argmax(ranges / copies)] += 1
        found = spend(ranges, extra)
        assert found.sum() == 9 + extra
        assert (ranges / found).max() == pytest.approx((ranges / copies).max(), rel=1e-9)


def test_copies_by_hand() -> None:
    np.testing.assert_array_equal(spend(np.array([4.0, 0.0]), 2), [3, 1])
    np.testing.assert_array_equal(spend(np.array([9.0, 3.0, 1.0]), 2), [3, 1, 1])
    np.testing.assert_array_equal(spend(np.array([2.0, 2.0]), 1), [2, 1])
    np.testing.assert_array_equal(spend(np.array([1.0, 6.0]), 7), [2, 7])


@pytest.mark.parametrize("seed", range(5))
def test_balance_is_the_best_of_eleven(seed: int) -> None:
    """(s_q² Σ f² E[k²] + s_k² Σ E[q²] / f²) / 12 with steps 2 max(r) / (levels - 1)."""
    random = np.random.default_rng(seed)
    half_q, half_k, power_q, power_k = np.exp(random.normal(0, 1.5, (4, 6)))

    def noise(f: Array) -> float:
        s_q = max(2 * half_q[c] / f[c] / 99 for c in range(6))
        s_k = max(2 * half_k[c] * f[c] / 99 for c in range(6))
        return (
            s_q**2 * sum(f[c] ** 2 * power_k[c] for c in range(6))
            + s_k**2 * sum(power_q[c] / f[c] ** 2 for c in range(6))
        ) / 12

    tried = []
    for tenth in range(11):
        raw = (half_q / half_k) ** (tenth / 20)
        tried.append(raw / math.prod(raw) ** (1 / 6))
    found = balance(half_q, half_k, power_q, power_k, 100)
    assert found.plain == pytest.approx(noise(np.ones(6)))
    assert found.noise == pytest.approx(min(map(noise, tried)))
    np.testing.assert_allclose(found.factor, min(tried, key=noise), rtol=1e-9)


def test_factors_are_4096_apart_at_most() -> None:
    found = normalized(np.array([1.0, 2.0**-5, 2.0**-20]))
    np.testing.assert_allclose(found[0] / found, [1, 2**5, 2**12])
    assert math.prod(found) == pytest.approx(1)
