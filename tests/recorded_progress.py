"""What a job tells of its progress, stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ptq_onnx.progress import WHOLE


@dataclass
class Stage:
    """One stage: its total, and the steps it told of."""

    name: str
    total: int
    steps: list[int] = field(default_factory=list)


class Recorded:
    """Taken as ``progress``."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    def __call__(self, name: str, total: int) -> Callable[[int], None]:
        self.stages.append(Stage(name, total))
        return self.stages[-1].steps.append

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self.stages]

    def assert_complete(self) -> None:
        """Every stage ends at its total, by steps forward; the whole job is one of them."""
        assert self.names.count(WHOLE) == 1
        for stage in self.stages:
            assert sum(stage.steps) == stage.total > 0, stage
            assert min(stage.steps) > 0, stage
