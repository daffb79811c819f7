"""What a rule says of a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Violation:
    """A rule that a file breaks. ``node`` is empty where the whole file is meant."""

    rule: str
    node: str
    text: str
    severity: Literal["error", "warning"] = "error"
