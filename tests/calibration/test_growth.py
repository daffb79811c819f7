"""Ranges that still grow: against NumPy, with a bound on what is remembered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ptq_onnx.calibration.methods import ChannelStatistics
from ptq_onnx.calibration.range_growth import POINTS, RangeTrace, find_growth


def trace(*values: float, low: float = 0.0) -> RangeTrace:
    """One image after the other, with these maxima."""
    result = RangeTrace()
    for index, value in enumerate(values):
        result.add(index + 1, low, value)
    return result


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1, 1, 1), 0.0),
        ((1, 1, 1.5), 0.5),  # the last of three is the last third
        ((1, 1.5, 1.5), 0.0),
        ((1, 2, 3, 4, 5, 6), 0.5),
        ((2, 1, 1), 0.0),
        ((0, 0, 1), None),  # nothing to grow from
        ((1,), None),
        ((), None),
    ],
)
def test_growth_since_two_thirds(values: tuple[float, ...], expected: float | None) -> None:
    assert trace(*values).growth() == (expected if expected is None else pytest.approx(expected))


def test_both_ends_count() -> None:
    found = RangeTrace()
    for images, low, high in ((1, -1, 1), (2, -1, 1), (3, -2, 1.5)):
        found.add(images, low, high)
    assert found.growth() == pytest.approx(0.75)


def test_a_single_batch_says_nothing() -> None:
    found = RangeTrace()
    found.add(128, 0, 1)
    assert found.growth() is None


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=63))
def test_against_numpy(values: list[float]) -> None:
    split = 2 * len(values) // 3
    then, now = max(values[:split]), max(values)
    assert trace(*values).growth() == pytest.approx((now - then) / then)


@pytest.mark.parametrize("images", [65, 100, 1000, 5000])
def test_memory_has_a_bound_and_the_end_stays_true(images: int) -> None:
    found = trace(*np.arange(1, images + 1, dtype=float))
    assert len(found.points) <= POINTS
    assert found.points[-1] == (images, 0.0, images)
    assert found.growth() == pytest.approx(0.5, abs=0.06)
    assert [p[0] for p in found.points] == sorted({p[0] for p in found.points})


def test_a_few_tensors_always_grow() -> None:
    quiet = {f"t{i}": trace(1, 1, 1) for i in range(97)}
    some = {f"g{i}": trace(1, 1, 1.2 + i / 10) for i in range(3)}
    found = find_growth({**quiet, **some})
    assert (found.total, [n for n, _ in found.grown]) == (100, ["g2", "g1", "g0"])
    assert found.warning is None
    assert find_growth({}).warning is None
    more = {f"h{i}": trace(1, 1, 1.2) for i in range(3)}
    told = find_growth({**quiet, **some, **more}).warning
    assert told is not None
    assert "6 of 103 tensors" in told
    assert "10 %" in told
    assert "that of g2 (by 40 %)" in told


def test_a_tensor_that_grows_by_half_is_enough() -> None:
    quiet = {f"t{i}": trace(1, 1, 1) for i in range(99)}
    assert find_growth({**quiet, "g": trace(1, 1, 1.4)}).warning is None
    told = find_growth({**quiet, "g": trace(1, 1, 1.6)}).warning
    assert told is not None
    assert "1 of 100" in told


def test_statistics_follow_the_whole_tensor_image_by_image() -> None:
    random = np.random.default_rng(0)
    values: NDArray[np.float32] = random.standard_normal((9, 7, 4)).astype(np.float32)
    values[8, 0, 0] = 20
    stats = ChannelStatistics.empty((4,))
    for batch in np.split(values, (4, 8)):
        power = np.square(batch).sum((0, 1))
        stats.update(batch.min(1), batch.max(1), power, batch.sum((0, 1)), batch.size // 4)
    early = values[:6]
    width = float(early.max() - early.min())
    expected = (float(values.max() - values.min()) - width) / width
    assert stats.trace.growth() == pytest.approx(expected, rel=1e-6)
    assert stats.pooled().trace.growth() == stats.trace.growth()
    assert [p[0] for p in stats.trace.points] == list(range(1, 10))
