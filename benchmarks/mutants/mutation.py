"""One change of one place of a module, by cosmic-ray's operators."""

from __future__ import annotations

import ast
import difflib
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

Span = tuple[tuple[int, int], tuple[int, int]]
LEFT_OUT = (
    "NoOp", "RemoveDecorator", "VariableInserter", "VariableReplacer", "Is_Eq", "IsNot_NotEq",
    "_Is", "_IsNot",
)  # fmt: skip
"""Operators without arguments of their own or that only change what holds a name; ``is`` for
``==`` is the same for small numbers and nonsense for arrays, and ``==`` for ``is`` the same for
nodes and values of a graph and for None."""


@dataclass(frozen=True)
class Mutant:
    """One operator's change at one place."""

    path: Path
    span: Span
    operator: str
    occurrence: int

    def source(self, text: str) -> str:
        """The module with the change."""
        return str(mutate_code(text, get_operator(self.operator)(), self.occurrence))

    def diff(self, text: str) -> list[str]:
        """The lines that the change takes and puts."""
        lines = difflib.unified_diff(
            text.splitlines(), self.source(text).splitlines(), n=0, lineterm=""
        )
        return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def _inside(node: ast.AST) -> tuple[tuple[int, int], tuple[int, int]]:
    return (
        (node.lineno, node.col_offset),  # type: ignore[attr-defined]
        (node.end_lineno, node.end_col_offset),  # type: ignore[attr-defined]
    )


def _without_numbers(text: str) -> Iterator[Span]:
    """Annotations and decorators, whose change no result shows, what only type checkers run, and
    what only guards against faults of the package itself (``assert``, ``strict`` of a zip), and
    what only people see of a value (``repr``)."""
    for node in ast.walk(ast.parse(text)):
        held = [getattr(node, name, None) for name in ("annotation", "returns")]
        held += getattr(node, "decorator_list", [])
        if isinstance(node, ast.Assert):
            held.append(node)
        if isinstance(node, ast.keyword) and node.arg in ("strict", "repr"):
            held.append(node)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("cast", "TypeVar"):
            held += node.args[:1]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp | ast.Subscript):
            alias = isinstance(node.targets[0], ast.Name) and not node.targets[0].id.isupper()
            if alias and node.col_offset == 0:
                held.append(node.value)  # Array = A | B
        for part in held:
            if isinstance(part, ast.AST):
                yield _inside(part)


def mutants(root: Path, path: Path) -> list[list[Mutant]]:
    """The changes of each place of a module: sampled by place, so that one ``+``, which has a dozen
    of them, counts as much as one number."""
    text = (root / path).read_text(encoding="utf-8")
    barred = list(_without_numbers(text))
    nodes = list(ast_nodes(get_ast(text)))
    places: dict[Span, list[Mutant]] = defaultdict(list)
    for name in operator_names():
        if any(part in name for part in LEFT_OUT if not part.startswith("_")):
            continue
        if name.endswith(LEFT_OUT[-2:]):
            continue
        operator = get_operator(name)()
        spans = (span for node in nodes for span in operator.mutation_positions(node))
        for occurrence, span in enumerate(spans):
            if not any(start <= span[0] and span[1] <= end for start, end in barred):
                places[span].append(Mutant(path, span, name, occurrence))
    return [places[span] for span in sorted(places)]


def sample(root: Path, paths: list[Path], number: int, seed: int) -> list[Mutant]:
    """``number`` places of the modules, one change of each, all in random order: a run that is cut
    short has met all rooms."""
    draw = random.Random(seed)
    places = [place for path in paths for place in mutants(root, path)]
    return [draw.choice(place) for place in draw.sample(places, min(number, len(places)))]
