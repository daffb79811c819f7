"""The order of the runs, how many there are, and the figures made of them: on a fake clock."""

from __future__ import annotations

from itertools import count

import pytest
from fake_runtime import FakeClock, FakeRunner

from ptq_onnx.targets.timing.interleaving import LEAST_ROUNDS, MOST_RUNS, WARM_UP, interleave
from ptq_onnx.targets.timing.results import quartiles_ms, speedup


def fake(clock: FakeClock, seconds: dict[str, float]) -> tuple[list[FakeRunner], list[str]]:
    log: list[str] = []
    return [FakeRunner(clock, lambda s=s: s, n, log) for n, s in seconds.items()], log


def test_models_take_turns_and_each_round_starts_with_another() -> None:
    clock = FakeClock()
    runners, log = fake(clock, {"a": 0.2, "b": 0.3, "c": 0.1})  # one run is a turn
    found = interleave([r.run for r in runners], 0, clock=clock)
    warm, rest = log[: 3 * WARM_UP], log[3 * WARM_UP :]
    assert warm == ["a"] * WARM_UP + ["b"] * WARM_UP + ["c"] * WARM_UP
    assert "".join(rest) == "abc" + "bca" + "cab" + "abc" + "bca"
    assert [len(rounds) for rounds in found] == [LEAST_ROUNDS] * 3
    assert found[1][0] == pytest.approx([0.3])


def test_rounds_go_on_until_each_model_had_its_seconds() -> None:
    clock = FakeClock()
    runners, _ = fake(clock, {"a": 0.2, "b": 0.3})
    told: list[float] = []
    found = interleave([r.run for r in runners], 10, clock=clock, progress=told.append)
    assert [len(rounds) for rounds in found] == [40, 40]  # 40 · 0.5 s = 2 · 10 s
    assert sum(told) == pytest.approx(20)


def test_short_runs_make_turns_of_many_the_first_not_counted() -> None:
    clock = FakeClock()
    runners, log = fake(clock, {"fast": 0.02, "instant": 0.0001})
    found = interleave([r.run for r in runners], 0, clock=clock)
    assert [len(r) for r in found[0]] == [5] * LEAST_ROUNDS  # 5 · 0.02 s = 0.1 s
    assert [len(r) for r in found[1]] == [MOST_RUNS] * LEAST_ROUNDS
    assert log.count("fast") == WARM_UP + LEAST_ROUNDS * (5 + 1)


def test_slow_first_runs_are_not_counted() -> None:
    clock, calls = FakeClock(), count()
    runner = FakeRunner(clock, lambda: 9.0 if next(calls) < WARM_UP - 1 else 0.2, "a", [])
    (rounds,) = interleave([runner.run], 0, clock=clock)
    assert [r for turn in rounds for r in turn] == pytest.approx([0.2] * LEAST_ROUNDS)


def test_quartiles_are_those_of_all_runs() -> None:
    assert quartiles_ms([[0.001, 0.005], [0.003], [0.002, 0.004]]) == pytest.approx((2, 3, 4))


def test_a_machine_that_slows_down_changes_no_speedup() -> None:
    reference = [[1.0], [1.0], [4.0], [4.0], [4.0]]
    own = [[0.5], [0.5], [2.0], [2.0], [2.0]]
    assert speedup(own, reference) == 2
    # One disturbed round does not either
    assert speedup([[0.5], [9.0], [2.0], [2.0], [2.0]], reference) == 2
    assert speedup(reference, own) == 0.5
