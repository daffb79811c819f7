"""A role of the model, in some of its blocks or in all."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ptq_onnx.config.bits import BYTE, LEAST, WIDEST
from ptq_onnx.config.option_types import shown
from ptq_onnx.errors import ConfigError

ALL = "all"
AUTO = "auto"
MOST_BLOCK_DIGITS = 4


@dataclass(frozen=True)
class Selector:
    """A role, in some blocks or in all: ``fc2``, ``fc2@5,6``, ``residual1@0-3``."""

    role: str
    blocks: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Raises ConfigError on anything else."""
        match = re.fullmatch(r"([a-z_][a-z0-9_.]*)(?:@([0-9,\-]+))?", str(text).strip())
        if match is None:
            raise ConfigError(f"'{text}' is not a role; write ROLE or ROLE@BLOCKS, as in fc2@5,6.")
        role, part = match.groups()
        if part is None:
            return cls(role)
        blocks: list[int] = []
        for piece in part.split(","):
            ends = piece.split("-")
            if not all(e.isdigit() for e in ends) or len(ends) > 2:
                raise ConfigError(
                    f"'{text}': '{piece}' is neither a block number nor a range such as 0-3."
                )
            if max(map(len, ends)) > MOST_BLOCK_DIGITS:
                raise ConfigError(f"{shown(text)}: no model has that many blocks.")
            first, last = int(ends[0]), int(ends[-1])
            if last < first:
                raise ConfigError(f"'{text}': the range {piece} runs backwards.")
            blocks.extend(range(first, last + 1))
        return cls(role, tuple(dict.fromkeys(blocks)))

    def matches(self, role: str, block: int | None) -> bool:
        """True for that role in that block."""
        return self.role in (role, ALL) and (self.blocks is None or block in self.blocks)

    def __str__(self) -> str:
        if self.blocks is None:
            return self.role
        return f"{self.role}@{','.join(map(str, self.blocks))}"


@dataclass(frozen=True)
class MoreBits:
    """A width for what a selector names: ``fc2``, which is 8 bits, or ``residual1@0-3=16``.

    ``fc1.weight`` names weights alone.
    """

    selector: Selector
    bits: int = BYTE

    @classmethod
    def parse(cls, text: str) -> MoreBits:
        """Raises ConfigError on anything else."""
        role, equals, number = str(text).partition("=")
        if not equals:
            return cls(Selector.parse(role))
        if not re.fullmatch(r"[0-9]{1,2}", number.strip()) or not LEAST <= int(number) <= WIDEST:
            raise ConfigError(
                f"--more-bits {shown(text)}: expected {BYTE} to {WIDEST} bits behind '=',"
                f" as in {shown(role.strip())[1:-1]}={WIDEST}."
            )
        return cls(Selector.parse(role), int(number))

    def __str__(self) -> str:
        return str(self.selector) if self.bits == BYTE else f"{self.selector}={self.bits}"
