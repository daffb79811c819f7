"""The search by itself, on made-up landscapes: additive ones, and any at all."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_onnx.auto.search import LIMIT, Option, Outcome, State, search, steps, taken
from ptq_onnx.config.stages import ENOUGH, TAKING_BACK

Noise = dict[str, float]
numbers = st.floats(0.001, 1, allow_nan=False)


def module(name: str, gain: float, cost: float = 1.0, kind: str = "float") -> Option:
    return Option(name, kind, gain, cost)


def additive(noise: Noise) -> Callable[[State], float]:
    """Noise of all modules, less what the options taken take away."""
    return lambda state: sum(noise.values()) - sum(o.gain for o in state.values())


class Counted:
    """A measure that knows how often it was asked, and for what."""

    def __init__(self, measure: Callable[[State], float]) -> None:
        self.measure = measure
        self.asked: list[frozenset[tuple[str, str]]] = []

    def __call__(self, state: State) -> float:
        self.asked.append(frozenset((o.module, o.kind) for o in state.values()))
        return self.measure(state)


def assert_minimal(
    found: Outcome[float],
    options: list[Option],
    measure: Callable[[State], float],
    met: Callable[[float], bool],
) -> None:
    """No single decision can be undone, or exchanged for a cheaper one of its module."""
    state = {o.module: o for o in found.decisions}
    assert len(state) == len(found.decisions)
    for name in state:
        rest = {m: o for m, o in state.items() if m != name}
        assert not met(measure(rest))
        assert found.without[name] == measure(rest)
        for other in options:
            if other.module == name and other.cost < state[name].cost:
                assert not met(measure({**rest, name: other}))


@given(st.lists(numbers, min_size=1, max_size=12), st.floats(0, 1))
def test_of_equal_cost_the_fewest(gains: list[float], share: float) -> None:
    """Additive, one price: as few as any subset that will do, by trying all of them."""
    noise = {f"m{i}": gain for i, gain in enumerate(gains)}
    options = [module(name, gain) for name, gain in noise.items()]
    bound = share * sum(gains) + 1e-9
    measure = additive(noise)
    found = search(options, measure, lambda s: s <= bound)
    assert found.met
    assert found.minimal
    assert found.result <= bound
    least = next(
        n
        for n in range(len(options) + 1)
        if any(measure({o.module: o for o in some}) <= bound for some in combinations(options, n))
    )
    assert len(found.decisions) == least
    gains_taken = [o.gain for o in found.decisions]
    assert gains_taken == sorted(gains_taken, reverse=True)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12), st.floats(0, 1))
def test_of_any_cost_no_decision_too_many(gains: list[tuple[float, float]], share: float) -> None:
    options = [module(f"m{i}", gain, cost) for i, (gain, cost) in enumerate(gains)]
    measure = additive({o.module: o.gain for o in options})
    bound = share * sum(gain for gain, _ in gains) + 1e-9
    found = search(options, measure, lambda s: s <= bound, each=0.1)
    assert found.met
    assert_minimal(found, options, measure, lambda s: s <= bound)


@settings(max_examples=100)
@given(st.integers(0, 10**6), st.integers(1, 9), st.booleans(), st.floats(0, 1))
def test_any_landscape_is_within_the_bound_and_minimal(
    seed: int, count: int, two: bool, bound: float
) -> None:
    """Scores that have nothing to do with the expectations, nor with each other."""
    draw = random.Random(seed)
    options = [module(f"m{i}", draw.random(), 1 + draw.random()) for i in range(count)]
    if two:
        options += [
            module(f"m{i}", draw.random() / 2, draw.random(), "8 bits") for i in range(count)
        ]
    table: dict[frozenset[tuple[str, str]], float] = {}

    def measure(state: State) -> float:
        key = frozenset((o.module, o.kind) for o in state.values())
        whole = sum(kind == "float" for _, kind in key) == count
        return table.setdefault(key, 0.0 if whole else draw.random())

    def met(score: float) -> bool:
        return score <= bound

    counted = Counted(measure)
    found = search(options, counted, met, limit=10**4)
    assert found.met
    assert found.minimal
    assert met(found.result)
    assert found.start == measure({})
    assert_minimal(found, options, measure, met)
    assert len(counted.asked) == len(set(counted.asked)) == found.runs


def test_nothing_where_nothing_is_needed() -> None:
    counted = Counted(lambda _: 0.0)
    found = search([module("a", 1)], counted, lambda s: s <= 0)
    assert (found.decisions, found.met, found.minimal, found.runs) == ((), True, True, 1)
    assert len(counted.asked) == 1


def test_says_where_everything_is_not_enough() -> None:
    found = search([module("a", 1), module("b", 2)], lambda _: 1.0, lambda s: s <= 0)
    assert not found.met
    assert not found.minimal
    assert (found.decisions, found.result, found.without) == ((), 1.0, {})
    assert not search([], lambda _: 1.0, lambda s: s <= 0).met


def test_takes_back_what_expectations_misjudged() -> None:
    """Only one of eight helps, and is expected to help least."""
    options = [module(f"m{i}", 1.0 / (1 + i)) for i in range(8)]
    found = search(options, lambda s: 0.0 if "m7" in s else 1.0, lambda s: s <= 0)
    assert [o.module for o in found.decisions] == ["m7"]


def test_the_costly_of_two_that_will_do_goes_first() -> None:
    options = [module("dear", 1.0, 10), module("cheap", 0.1, 1), module("half", 0.9, 9)]
    found = search(options, lambda s: 0.0 if s.keys() & {"dear", "half"} else 1.0, lambda s: s == 0)
    assert [o.module for o in found.decisions] == ["half"]


def test_few_measurements_on_many_modules() -> None:
    """Doubling and bisection find how many; each decision is then tried without."""
    noise = {f"m{i}": 0.9**i for i in range(300)}
    options = [module(name, gain) for name, gain in noise.items()]
    found = search(options, additive(noise), lambda s: s <= 0.1)
    count = len(found.decisions)
    assert 30 < count < 50
    assert found.runs <= count + 2 * count.bit_length() + 1


@pytest.mark.parametrize("limit", [1, 2, 5, 9, 12, 20])
def test_a_limit_of_measurements(limit: int) -> None:
    noise = {f"m{i}": 1.0 for i in range(40)}
    options = [module(name, 1.0) for name in noise]
    counted = Counted(additive(noise))
    found = search(options, counted, lambda s: s <= 10.5, limit=limit)
    assert found.met
    assert found.result <= 10.5
    assert not found.minimal
    assert len(counted.asked) <= limit + 1
    assert search(options, counted, lambda s: s <= 10.5, limit=LIMIT).minimal


def test_progress_tells_of_every_trial() -> None:
    seen: dict[str, list[int]] = {}

    def stage(name: str, total: int) -> Callable[[int], None]:
        numbers = seen.setdefault(name, [0, 0])
        numbers[1] += total

        def advance(done: int) -> None:
            numbers[0] += done

        return advance

    noise = {f"m{i}": 0.7**i for i in range(30)}
    options = [module(name, gain) for name, gain in noise.items()]
    search(options, additive(noise), lambda s: s <= 0.1, stage=stage)
    assert list(seen) == [ENOUGH, TAKING_BACK]
    assert all(0 < done == total for done, total in seen.values())


# Steps


def test_steps_go_by_gain_per_cost() -> None:
    options = [module("a", 1, 2), module("b", 1, 1), module("c", 3, 2)]
    assert [o.module for o in steps(options)] == ["c", "b", "a"]
    # Where every decision costs much by itself, gain alone counts.
    assert [o.module for o in steps([module("a", 2, 2), module("b", 1.9, 1)], each=100)] == [
        "a",
        "b",
    ]


def test_the_cheaper_option_comes_before_the_stronger() -> None:
    options = [module("a", 1.0, 4), module("a", 0.9, 1, "8 bits"), module("b", 0.3, 1)]
    order = [(o.module, o.kind) for o in steps(options)]
    assert order == [("a", "8 bits"), ("b", "float"), ("a", "float")]
    state = taken(steps(options), 3)
    assert {m: o.kind for m, o in state.items()} == {"b": "float", "a": "float"}


def test_a_cheaper_option_that_hardly_helps_is_passed_over() -> None:
    options = [module("a", 1.0, 4), module("a", 0.01, 1, "8 bits")]
    assert [(o.module, o.kind) for o in steps(options)] == [("a", "float")]


@given(
    st.dictionaries(
        st.sampled_from("abcde"),
        st.lists(st.tuples(numbers, numbers), min_size=1, max_size=3),
        min_size=1,
    )
)
def test_every_module_ends_at_its_strongest(
    modules: Mapping[str, list[tuple[float, float]]],
) -> None:
    options = [
        module(name, gain, cost, f"k{i}")
        for name, pairs in modules.items()
        for i, (gain, cost) in enumerate(pairs)
    ]
    state = taken(steps(options, each=0.01), len(options))
    for name, pairs in modules.items():
        assert state[name].cost == max(cost for _, cost in pairs)
