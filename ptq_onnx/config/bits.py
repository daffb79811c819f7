"""Bit widths of weights, activations and attention maps."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ptq_onnx.errors import ConfigError

MOST_BITS = 8


@dataclass(frozen=True)
class Bits:
    """Bit widths of weights, activations and attention maps, 2 to 8 each."""

    weights: int = 8
    activations: int = 8
    attention: int = 8

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "attention"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8:
                raise ConfigError(
                    f"bits: {name} must be a whole number from 2 to 8, got {value!r}."
                )

    @classmethod
    def parse(cls, text: str) -> Bits:
        """``8/8/4`` → weights 8, activations 8, attention 4. Raises ConfigError."""
        parts = str(text).split("/")
        if len(parts) != 3 or not all(re.fullmatch(r"[0-9]{1,3}", p.strip()) for p in parts):
            raise ConfigError(
                f"--bits {text}: expected weights/activations/attention, as in 8/8/4,"
                " each from 2 to 8."
            )
        return cls(*(int(p) for p in parts))

    def __str__(self) -> str:
        return f"{self.weights}/{self.activations}/{self.attention}"
