"""Turns of many models, one after the other, so that what the machine does hits all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

WARM_UP = 2
"""Runs before anything is timed: the first allocates memory and picks kernels."""
LEAST_ROUNDS = 5
TURN = 0.1
"""Seconds that a turn should last: a model is timed with its own weights in the caches."""
MOST_RUNS = 20
"""Runs in a turn at most."""


def interleave(
    runs: Sequence[Callable[[], None]],
    seconds: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[float], None] | None = None,
) -> list[list[list[float]]]:
    """Seconds of every run, by model and round.

    Rounds go on until each model has had ``seconds`` on average, and at least
    :data:`LEAST_ROUNDS`. A turn is as many runs as last :data:`TURN`; where that is more than
    one, a first one is not counted. Each round starts with another model. ``progress`` is
    called with the seconds that each turn took.
    """
    lengths = [_turn_length(run, clock) for run in runs]
    found: list[list[list[float]]] = [[] for _ in runs]
    count, start = len(runs), clock()
    while len(found[-1]) < LEAST_ROUNDS or clock() - start < seconds * count:
        first = len(found[0]) % count
        for index in (*range(first, count), *range(first)):
            begun = clock()
            found[index].append(_turn(runs[index], lengths[index], clock))
            if progress is not None:
                progress(clock() - begun)
    return found


def _turn_length(run: Callable[[], None], clock: Callable[[], float]) -> int:
    """Warm up; then how many runs make a turn."""
    for _ in range(WARM_UP - 1):
        run()
    last = _timed(run, clock)
    return min(MOST_RUNS, max(1, math.ceil(TURN / last))) if last > 0 else MOST_RUNS


def _turn(run: Callable[[], None], length: int, clock: Callable[[], float]) -> list[float]:
    if length > 1:
        run()
    return [_timed(run, clock) for _ in range(length)]


def _timed(run: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start
