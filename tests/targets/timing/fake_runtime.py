"""A runtime with a clock of its own, so that every figure of a benchmark is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ptq_onnx.targets.timing.runner import AS_WRITTEN
from ptq_onnx.targets.timing.timed_model import Subject


@dataclass
class FakeClock:
    """Time that passes only where a runner says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeRunner:
    clock: FakeClock
    duration: Callable[[], float]
    name: str
    log: list[str]
    memory: int | None = None

    def run(self) -> None:
        self.clock.now += self.duration()
        self.log.append(self.name)


@dataclass
class FakeRuntime:
    """Runs last ``seconds`` by file name, times the batch; half precision takes half as long."""

    clock: FakeClock
    seconds: dict[str, float]
    half: str | None = None
    half_note: str = "no halves here"
    on_gpu: bool = False
    name: str = "fake"
    version: str = "1.0"
    device: str = "thin air"
    log: list[str] = field(default_factory=list)
    opened: list[tuple[str, int, int, str]] = field(default_factory=list)

    def open(
        self, subject: Subject, batch: int, *, threads: int, precision: str
    ) -> FakeRunner | None:
        name = subject.path.name
        self.opened.append((name, batch, threads, precision))
        if precision != AS_WRITTEN and subject.quantized:
            return None
        seconds = self.seconds[name] * batch / (1 if precision == AS_WRITTEN else 2)
        return FakeRunner(self.clock, lambda: seconds, name, self.log)
