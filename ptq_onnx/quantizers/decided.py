"""What a quantizer decides before it sees an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ptq_onnx.numerics.spec import Rule, Site


@dataclass(frozen=True)
class Decided:
    """A rule for every site that gets codes, the reason for every other; prints as a line each."""

    sites: Mapping[str, Site]
    rules: Mapping[str, Rule]
    floats: Mapping[str, str]

    def __str__(self) -> str:
        return "\n".join(
            f"{tensor} ({site.label}): {self.rules.get(tensor) or f'float, {self.floats[tensor]}'}"
            for tensor, site in self.sites.items()
        )
