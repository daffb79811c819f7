"""The search for few, cheap decisions that bring a measured score within a bound.

What it finds is a set from which nothing can be taken, nor made cheaper, one decision at a time;
that no smaller set will do it does not promise. It knows nothing of models. A module is treated by
one of its options, or by none. Options are taken in the order of what they are expected to gain
per cost; how many are needed is measured (doubling, then bisection); then decisions are taken
back, those first that cost most for what they gain, until not a single one can be. Expectations
only order: every answer rests on measured scores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ptq_onnx.config.stages import ENOUGH, TAKING_BACK

S = TypeVar("S")
Stage = Callable[[str, int], Callable[[int], None]]
LEAST = 1e-12
"""What stands for no cost."""
LIMIT = 250
"""Measurements at most."""


@dataclass(frozen=True)
class Option:
    """One way to treat one module; a module's costlier options are the stronger ones.

    ``gain``: the noise that it is expected to take away; ``cost``: not negative. Both are
    compared with doing nothing.
    """

    module: str
    kind: str
    gain: float
    cost: float


State = Mapping[str, Option]
"""The option chosen for each module that has one."""


@dataclass(frozen=True)
class Outcome(Generic[S]):
    """What :func:`search` found.

    ``decisions`` in the order in which they were taken; ``start``: the score of none;
    ``result``: of all; ``without``: of all but the one of that module. ``met``: the result is
    within the bound. ``minimal``: no single decision can be undone, or replaced by a cheaper
    one of its module, within it. ``runs``: how many states were measured.
    """

    decisions: tuple[Option, ...]
    start: S
    result: S
    without: Mapping[str, S]
    met: bool
    minimal: bool
    runs: int


class OutOfRuns(Exception):
    """The limit of measurements is reached."""


@dataclass
class _Measured(Generic[S]):
    """Measures each state once, and at most ``limit`` states."""

    measure: Callable[[State], S]
    limit: int
    known: dict[frozenset[tuple[str, str]], S] = field(default_factory=dict)

    def __call__(self, state: State, *, final: bool = False) -> S:
        key = frozenset((o.module, o.kind) for o in state.values())
        if key not in self.known:
            if len(self.known) >= self.limit and not final:
                raise OutOfRuns
            self.known[key] = self.measure(state)
        return self.known[key]


def search(
    options: Sequence[Option],
    measure: Callable[[State], S],
    met: Callable[[S], bool],
    *,
    each: float = 0.0,
    limit: int = LIMIT,
    stage: Stage | None = None,
) -> Outcome[S]:
    """Decisions that bring the measured score within the bound, of which none can be undone or
    made cheaper.

    ``measure`` gives the score of a state, ``met`` says whether it is good enough. Nothing is
    assumed of them; where all the strongest options together are not enough, nothing is decided
    and the outcome says so. ``each``: what any decision costs by itself, so that few are better
    than many. ``stage`` is the pipeline's progress, told of measurements.
    """
    begin = stage or (lambda *_: lambda _: None)
    known = _Measured(measure, limit)
    start = known({}, final=True)
    if met(start) or not options:
        return Outcome((), start, start, {}, met(start), True, 1)
    order = steps(options, each)
    state = taken(order, _enough(order, known, met, begin))
    if not met(known(state, final=True)):
        return Outcome((), start, start, {}, False, False, len(known.known))
    state, without, minimal = _take_back(options, state, known, met, begin)
    return Outcome(
        tuple(state.values()), start, known(state), without, True, minimal, len(known.known)
    )


def steps(options: Iterable[Option], each: float = 0.0) -> list[Option]:
    """The options in the order of gain per cost, the best first; of equals the cheaper.

    The first of a module costs ``each`` besides.

    Of a module with several, each counts with what it adds to the one before. One whose addition
    is worth more per cost than the one before makes that one needless.
    """
    by_module: dict[str, list[Option]] = {}
    for option in options:
        by_module.setdefault(option.module, []).append(option)
    ranked: list[tuple[float, float, Option]] = []
    for own in by_module.values():
        path: list[tuple[float, float, Option]] = []  # worth, gain, option
        for option in sorted(own, key=lambda o: o.cost):
            while True:
                gain, cost = (path[-1][1], path[-1][2].cost) if path else (0.0, -each)
                worth = max(option.gain - gain, 0.0) / max(option.cost - cost, LEAST)
                if not path or worth < path[-1][0]:
                    break
                path.pop()
            path.append((worth, max(option.gain, gain), option))
        ranked.extend((-worth, option.cost, option) for worth, _, option in path)
    return [option for *_, option in sorted(ranked, key=lambda r: r[:2])]


def taken(order: Sequence[Option], count: int) -> dict[str, Option]:
    """The state after the first steps; a module's later step replaces its earlier one."""
    state: dict[str, Option] = {}
    for option in order[:count]:
        state.pop(option.module, None)
        state[option.module] = option
    return state


def _enough(
    order: Sequence[Option],
    known: _Measured[S],
    met: Callable[[S], bool],
    begin: Stage,
) -> int:
    """How many steps are enough where one less is not; all of them where no fewer were seen
    to be."""
    left = 2 * len(order).bit_length()  # at most
    advance = begin(ENOUGH, left)
    low, high, found = 0, 1, False
    try:
        while high < len(order) and not met(known(taken(order, high))):
            low, high = high, min(2 * high, len(order))
            advance(1)
            left -= 1
        found = True
        while high - low > 1:
            middle = (low + high) // 2
            good = met(known(taken(order, middle)))
            low, high = (low, middle) if good else (middle, high)
            advance(1)
            left -= 1
    except OutOfRuns:
        high = high if found else len(order)
    advance(left)
    return high


def _take_back(
    options: Sequence[Option],
    state: dict[str, Option],
    known: _Measured[S],
    met: Callable[[S], bool],
    begin: Stage,
) -> tuple[dict[str, Option], dict[str, S], bool]:
    """Undo decisions, or replace them by cheaper ones, until none can be: the state, the scores
    without each decision, and whether all were tried."""
    waiting = deque(sorted(state, key=lambda m: state[m].gain / max(state[m].cost, LEAST)))
    needed = tries = total = 0
    without: dict[str, S] = {}
    try:
        while needed < len(waiting):
            if tries == total:
                tries, total = 0, len(waiting) - needed
                advance = begin(TAKING_BACK, total)
            module = waiting[0]
            waiting.rotate(-1)
            rest = {m: o for m, o in state.items() if m != module}
            own = [o for o in options if o.module == module and o.cost < state[module].cost]
            lesser = [rest, *({**state, module: o} for o in sorted(own, key=lambda o: o.cost))]
            better = next((s for s in lesser if met(known(s))), None)
            tries += 1
            advance(1)
            if better is None:
                needed += 1
                without[module] = known(rest)
                continue
            state, needed, without = better, 0, {}
            if module not in state:
                waiting.pop()
    except OutOfRuns:
        return state, without, False
    return state, without, True
