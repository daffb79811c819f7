"""Twin-uniform codes: the levels, the border of the two ranges, and the ratio of their steps."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_onnx.numerics.codes.code import Numbers
from ptq_onnx.numerics.codes.twin import Twin, attention_ratio, border

TWIN = Twin()


def numbers(scale: float, ratio: int, bits: int, signed: bool) -> Numbers:
    step, zero = np.array(scale, np.float32), np.array(0, np.int32)
    return Numbers(bits, signed, step, zero, {"ratio": ratio})


def test_levels_of_an_attention_map() -> None:
    """Four bits, s1 = 1/32, s2 = 1/8 = 2^-(k-1): 0 … 7 of each."""
    found = numbers(1 / 32, 2, 4, False)
    values = TWIN.values(np.arange(16, dtype=np.int32), found)
    np.testing.assert_array_equal(values, [*(np.arange(8) / 32), *(np.arange(8) / 8)])
    x = np.float32([0, 0.01, 0.2, 7 / 32, 0.23, 0.24, 0.3, 0.32, 0.9, 1])
    np.testing.assert_array_equal(TWIN.codes(x, found), [0, 0, 6, 7, 7, 10, 10, 11, 15, 15])
    assert TWIN.reach(found) == (0, 7 / 8)


def test_levels_of_what_gelu_makes() -> None:
    """Negative steps 0.01, positive ones 0.08; a small negative value is zero."""
    found = numbers(0.01, 3, 4, True)
    x = np.float32([-1, -0.07, -0.014, -0.004, 0, 0.03, 0.05, 0.5, 9])
    codes = TWIN.codes(x, found)
    np.testing.assert_array_equal(codes, [-7, -7, -1, 0, 0, 0, 1, 6, 7])
    expected = np.where(codes < 0, codes * 0.01, codes * 0.08)
    np.testing.assert_allclose(TWIN.values(codes, found), expected, rtol=1e-6)


@pytest.mark.parametrize(("bits", "ratio"), [(b, r) for b in (3, 4, 6, 8) for r in range(1, 13)])
def test_the_border_is_half_way(bits: int, ratio: int) -> None:
    """Between the last level of the fine range and the next one of the coarse range."""
    last, coarse = 2 ** (bits - 1) - 1, 2**ratio
    above = next(k * coarse for k in range(1, 1000) if k * coarse > last)
    assert border(bits, ratio) == (last + above) / 2
    found = numbers(1.0, ratio, bits, False)
    near = np.float32([border(bits, ratio), border(bits, ratio) + 0.01])
    assert TWIN.values(TWIN.codes(near, found), found).tolist() == [last, above]


def test_steps_cover_both_sides_and_are_a_power_of_two_apart() -> None:
    low, high = np.float32([-0.17]), np.float32([10.0])
    found = TWIN.solve(low, high, 8, True, False)
    fine, ratio = float(found.scale[0]), found.details["ratio"]
    assert ratio == 5  # 2^5 <= 10 / 0.17 < 2^6
    assert fine * 2**ratio * 127 == pytest.approx(10)
    assert 0.17 <= fine * 127 < 0.34
    map_ = TWIN.solve(np.float32([0]), np.float32([1]), 8, False, False)
    assert float(map_.scale[0]) * 2 ** map_.details["ratio"] == 1 / 128


def test_the_ratio_of_a_map_is_that_of_the_least_bound() -> None:
    """4^-m + E[x²] 4^m over all m, where the fine range ends at 2^-m."""
    for moment in (1e-6, 1e-4, 4e-4, 1e-2, 0.05):
        bounds = [4.0**-m + moment * 4.0**m for m in range(1, 17)]
        assert attention_ratio(moment) == 1 + int(np.argmin(bounds))
    assert attention_ratio(0.0) == 16
    assert attention_ratio(1.0) == 1


@pytest.mark.parametrize("name", ["ratio"])
@pytest.mark.parametrize("value", [None, 0, 17, 2.0, True, "3"])
def test_a_ratio_from_a_report_is_checked(name: str, value: object) -> None:
    assert TWIN.read_details({name: 3}) == {"ratio": 3}
    with pytest.raises(ValueError, match="ratio of codes 'twin' is not from 1 to 16"):
        TWIN.read_details({name: value})
