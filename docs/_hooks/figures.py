"""Rows of the tables in measurements.md: a figure stands there once, other pages quote it."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "measurements.md"
TABLE = re.compile(r"^<!-- table: ([a-z0-9-]+) -->\n+((?:\|.*\n)+)", re.M)


def tables() -> dict[str, list[str]]:
    """The lines of each table that has a name, head and rule first."""
    text = PAGE.read_text(encoding="utf-8")
    return {found[1]: found[2].splitlines() for found in TABLE.finditer(text)}


def rows(name: str, *patterns: str) -> str:
    """The table ``name`` with the rows whose first cell holds one of the patterns (none: all).

    Raises KeyError for an unknown table, ValueError where a pattern finds nothing.
    """
    head, rule, *body = tables()[name]
    chosen = [line for line in body if not patterns or _matches(line, patterns)]
    for pattern in patterns:
        if not any(_matches(line, (pattern,)) for line in body):
            raise ValueError(f"measurements.md, table {name}: no row with '{pattern}'.")
    return "\n".join([head, rule, *chosen])


def _matches(line: str, patterns: tuple[str, ...]) -> bool:
    first = line.split("|")[1]
    return any(re.search(pattern, first) for pattern in patterns)
