"""An option is a field that carries all that is told of it: one home for the command line, YAML,
keywords and the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

FLAG = "flag"
"""The key of a field's metadata."""

INPUT, NUMBERS, TARGET, ANALYSIS, RUNNING = "Input", "Numbers", "Target", "Analysis", "Running"
"""The groups of ``--help``."""


@dataclass(frozen=True)
class Flag:
    """How an option is called on the command line, and what is told of it.

    ``metavar`` None: a switch, ``--name`` and ``--no-name``. ``shown``: the default in words.
    ``bounds``: the smallest and the largest value that makes sense, of each where there are
    several; ``unit`` and ``hint`` are told beside them. ``choices``: the names it takes, besides
    its default.
    """

    group: str
    metavar: str | None
    text: str
    shown: str
    bounds: tuple[float, float] | None = None
    hint: str = ""
    unit: str = ""
    choices: tuple[str, ...] = ()


def option(
    default: Any,
    group: str,
    metavar: str | None,
    text: str,
    *,
    shown: str | None = None,
    bounds: tuple[float, float] | None = None,
    hint: str = "",
    unit: str = "",
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of a dataclass of options."""
    words = ("on" if default else "off") if isinstance(default, bool) else str(default)
    told = words if shown is None else shown
    flag = Flag(group, metavar, text, told, bounds, hint, unit, choices)
    return field(default=default, metadata={FLAG: flag})


def flags(config: Any) -> Mapping[str, Flag]:
    """The flags of a dataclass of options, or of its instance, by the names of the fields."""
    return {one.name: flag_of(one) for one in fields(config)}


def flag_of(one: Field[Any]) -> Flag:
    """The flag of one field."""
    flag: Flag = one.metadata[FLAG]
    return flag
