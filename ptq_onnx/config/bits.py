"""Bit widths of weights, activations and attention maps."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ptq_onnx.errors import ConfigError

LEAST = 2
"""The fewest bits of anything."""
BYTE = 8
"""The most bits of a weight, and of what integer kernels multiply."""
HALF = 4
"""The most bits of weights in blocks of rows."""
WIDEST = 16
"""The most bits of an activation."""
MOST = {"weights": BYTE, "activations": WIDEST, "attention": WIDEST}


@dataclass(frozen=True)
class Bits:
    """Bit widths: weights 2 to 8, activations and attention maps 2 to 16."""

    weights: int = 8
    activations: int = 8
    attention: int = 8

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not LEAST <= value <= most:
                raise ConfigError(
                    f"bits: {name} must be a whole number from 2 to {most}, got {value!r}."
                )

    @classmethod
    def parse(cls, text: str) -> Bits:
        """``8/8/4`` → weights 8, activations 8, attention 4. Raises ConfigError."""
        parts = str(text).split("/")
        if len(parts) != 3 or not all(re.fullmatch(r"[0-9]{1,3}", p.strip()) for p in parts):
            raise ConfigError(
                f"--bits {text}: expected weights/activations/attention, as in 8/8/4,"
                f" from 2 to {BYTE}, {WIDEST} and {WIDEST}."
            )
        return cls(*(int(p) for p in parts))

    def __str__(self) -> str:
        return f"{self.weights}/{self.activations}/{self.attention}"
