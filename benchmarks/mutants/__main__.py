"""Small faults put into the package, one at a time: how many of them the tests see.

    python -m benchmarks.mutants [--rooms numerics calibration] [--mutants 200] [--seed 1]

Places of the rooms' modules are drawn by the seed, and at each one of cosmic-ray's operators
(another operator or comparison, a number one more or less, a condition turned …). A mutant meets
the tests of its room that call the function it is in, those first that call little else, until one
fails or their ``--budget`` is over; a mutant of a module's or class's own lines meets all that call
into the module, or whose file imports from it.
Printed: a table by file, and each survivor with its change. Survivors are read by a person: those
that change nothing that could be seen are listed in ``equivalent.py`` and not counted.
"""

from __future__ import annotations

import argparse
import ast
import functools
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.mutants.equivalent import reason
from benchmarks.mutants.mutation import Mutant, sample
from benchmarks.mutants.rooms import ROOMS, ROOT, files_of
from benchmarks.mutants.running import Function, Record, passes, preload, recorded

LIMIT = 900.0
"""Seconds for the tests of a room without a mutant."""
SLACK = 20.0
"""Seconds more than three times their usual ones that tests may take before a mutant hangs."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: killed, survived, timeout, equivalent, or unreached by any test."""

    mutant: Mutant
    text: str
    word: str


def function_of(path: Path, text: str, line: int) -> Function | None:
    """The innermost function around a line; None for the module's and the classes' own lines."""
    found = None
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.body[0].lineno <= line <= node.end_lineno:  # type: ignore[operator]
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found = max(found or 0, first)
    return None if found is None else (str(path), found)


@functools.cache
def imported(file: str) -> frozenset[str]:
    """The modules that a test's file imports from."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom))


def tests_of(record: Record, mutant: Mutant, text: str, budget: float) -> list[str]:
    """Who reaches the mutant, as far as the budget goes: first who calls little else."""
    whole = str(ROOT / mutant.path)
    function = function_of(Path(whole), text, mutant.span[0][0])
    module = ".".join(mutant.path.with_suffix("").parts)

    def reaches(name: str, found: set[Function]) -> bool:
        if function is not None:
            return function in found
        return any(file == whole for file, _ in found) or module in imported(
            name.partition("::")[0]
        )

    chosen, spent = [], 0.0
    for name in sorted(record.seconds, key=lambda n: (len(record.calls[n]), record.seconds[n])):
        if reaches(name, record.calls[name]) and spent <= budget:
            chosen.append(name)
            spent += record.seconds[name]
    return chosen


def judged(mutant: Mutant, record: Record, budget: float) -> Outcome:
    text = (ROOT / mutant.path).read_text(encoding="utf-8")
    if reason(mutant.path, mutant.diff(text)) is not None:
        return Outcome(mutant, text, "equivalent")
    names = tests_of(record, mutant, text, budget)
    if not names:
        return Outcome(mutant, text, "unreached")
    usual = sum(record.clock[name] for name in names)
    passed = passes(mutant.path, mutant.source(text), names, 3 * usual + SLACK)
    return Outcome(mutant, text, {None: "timeout", True: "survived", False: "killed"}[passed])


def table(outcomes: list[Outcome]) -> list[str]:
    words = ("killed", "timeout", "survived", "unreached", "equivalent")
    lines = [f"{'file':46}" + "".join(f"{word:>11}" for word in words) + f"{'left':>8}"]
    by_file: dict[str, Counter[str]] = {}
    for one in outcomes:
        name = str(one.mutant.path.relative_to("ptq_onnx"))
        for key in (name, "all"):
            by_file.setdefault(key, Counter())[one.word] += 1
    for name in sorted(by_file, key=lambda n: (n == "all", n)):
        counts = by_file[name]
        counted = max(counts.total() - counts["equivalent"], 1)
        left = (counts["survived"] + counts["unreached"]) / counted
        lines.append(f"{name:46}" + "".join(f"{counts[w]:11}" for w in words) + f"{left:8.1%}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS))
    parser.add_argument("--mutants", type=int, default=200, help="of all rooms together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budget", type=float, default=10, help="seconds of tests for a mutant")
    parser.add_argument("--minutes", type=float, default=60, help="no further mutant after these")
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes
    sys.path.insert(0, str(ROOT))
    room_of = {path: room for room in given.rooms for path in files_of(room)}
    chosen = sample(ROOT, list(room_of), given.mutants, given.seed)
    preload()
    records: dict[str, Record] = {}
    outcomes: list[Outcome] = []
    for mutant in chosen:
        room = room_of[mutant.path]
        if room not in records:
            records[room] = recorded(ROOT, ROOMS[room], LIMIT)
        if time.monotonic() > until:
            print(
                f"{len(chosen) - len(outcomes)} mutants were left out: {given.minutes:g} minutes."
            )
            break
        outcome = judged(mutant, records[room], given.budget)
        outcomes.append(outcome)
        if outcome.word in ("survived", "unreached"):
            print(f"\n{outcome.word}: {mutant.path}:{mutant.span[0][0]}")
            print("\n".join(mutant.diff(outcome.text)), flush=True)
    print("\n" + "\n".join(table(outcomes)))


if __name__ == "__main__":
    main()
