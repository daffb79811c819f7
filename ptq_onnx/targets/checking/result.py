"""What a check returns: violations of rules, and counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning"]
Facts = Mapping[str, Mapping[str, int | str]]
"""What only one target counts or names, by title."""


@dataclass(frozen=True)
class Finding:
    """What a rule says of one node.

    An ``error``: the runtime refuses the file, computes other numbers, or computes in float
    what the file quantizes. A ``warning``: it works, but costs time or is left in float on
    purpose.
    """

    node: str
    text: str
    severity: Severity = "error"


@dataclass(frozen=True)
class Violation:
    """A finding, with the name of its rule. ``node`` is empty where the whole file is meant."""

    rule: str
    node: str
    text: str
    severity: Severity = "error"


class Skipped(Exception):
    """Raised by a rule that cannot be checked here; says why in one line."""


@dataclass(frozen=True)
class Report:
    """The outcome of checking one file against the rules of one target."""

    target: str
    rules: tuple[str, ...]
    """Names of the rules that were checked."""
    violations: tuple[Violation, ...]
    skipped: Mapping[str, str]
    """Rules that could not be checked, with the reason."""
    ops: Mapping[str, int]
    """How often each op occurs in the file."""
    linears: int
    """Products with a constant weight."""
    quantized_linears: int
    """Those whose inputs are all quantized to 8 bits in the file."""
    products: int
    """Products of two activations."""
    quantized_products: int
    facts: Facts = field(default_factory=dict)
    """Counts and names that only this target has."""

    @property
    def errors(self) -> tuple[Violation, ...]:
        """What the runtime refuses, or computes wrongly."""
        return tuple(v for v in self.violations if v.severity == "error")

    @property
    def warnings(self) -> tuple[Violation, ...]:
        """What works, and costs time or accuracy."""
        return tuple(v for v in self.violations if v.severity == "warning")

    @property
    def conforms(self) -> bool:
        """No errors; warnings may be there."""
        return not self.errors

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {"conforms": self.conforms, **asdict(self)}
