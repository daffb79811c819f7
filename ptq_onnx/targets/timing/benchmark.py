"""The whole benchmark: models × batch sizes × precisions, in one runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ptq_onnx.errors import ConfigError
from ptq_onnx.targets.timing.advice import advice
from ptq_onnx.targets.timing.cpu import flags
from ptq_onnx.targets.timing.interleaving import interleave
from ptq_onnx.targets.timing.memory import peak_memory
from ptq_onnx.targets.timing.results import Benchmark, Rounds, Timing, quartiles_ms, speedup
from ptq_onnx.targets.timing.runner import AS_WRITTEN, Runner, Runtime
from ptq_onnx.targets.timing.timed_model import Subject, read_subject

BATCHES = (1, 8)
"""The batch sizes where none are asked for."""
SECONDS = 5.0

Memory = Callable[[str, Subject, int, int, str], int | None]
Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class _Entry:
    """What takes part in the rounds of one batch size."""

    index: int
    subject: Subject
    precision: str
    runner: Runner


def benchmark(
    models: Sequence[str | Path],
    runtime: Runtime,
    *,
    batches: Sequence[int] | None = None,
    threads: int = 0,
    seconds: float = SECONDS,
    memory: Memory = peak_memory,
    progress: Progress | None = None,
) -> Benchmark:
    """Time ``models`` side by side; the first is what the others are compared with.

    ``batches`` None: :data:`BATCHES`, or the one that the models are fixed to. Each model and
    batch gets ``seconds``. Raises ConfigError, ModelError.
    """
    _check(models, batches, threads, seconds)
    subjects = [read_subject(path) for path in models]
    chosen, notes = _batches(subjects, batches)
    names, twins = _names(subjects), _twins(subjects)
    notes += [
        f"{names[i]} and {names[j]} are the same file: what differs between them is the noise of"
        " the measurement."
        for i, j in twins.items()
    ]
    timings: list[Timing] = []
    for batch in chosen:
        timings += _at(batch, subjects, runtime, threads, seconds, memory, progress)
    if runtime.half_note:
        notes.append(runtime.half_note)
    notes += advice(timings, runtime=runtime.name, on_gpu=runtime.on_gpu, cpu=flags())
    return Benchmark(
        runtime=runtime.name,
        version=runtime.version,
        device=runtime.device,
        threads=threads,
        seconds=seconds,
        timings=tuple(timings),
        notes=tuple(notes),
    )


def _check(
    models: Sequence[str | Path], batches: Sequence[int] | None, threads: int, seconds: float
) -> None:
    if not models:
        raise ConfigError("benchmark needs model files: FP32.onnx Q.onnx ….")
    if batches is not None and (not batches or min(batches) < 1):
        raise ConfigError(f"--batch: sizes must be at least 1, got {list(batches)}.")
    if threads < 0:
        raise ConfigError(f"--threads must be at least 0, got {threads}.")
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"--seconds must not be negative, got {seconds}.")


def _batches(
    subjects: Sequence[Subject], asked: Sequence[int] | None
) -> tuple[tuple[int, ...], list[str]]:
    """The batch sizes that all models take, and what to say about it. Raises ConfigError."""
    fixed = {s.batch: s for s in subjects if s.batch is not None}
    if len(fixed) > 1:
        text = ", ".join(f"{s.path.name}: {size}" for size, s in sorted(fixed.items()))
        raise ConfigError(f"The models are fixed to different batch sizes ({text}).")
    if not fixed:
        return tuple(dict.fromkeys(asked or BATCHES)), []
    ((size, subject),) = fixed.items()
    other = next((b for b in asked or () if b != size), None)
    if other is not None:
        raise ConfigError(
            f"--batch {other}: {subject.path} is fixed to batches of {size}; export it with a"
            " dynamic batch axis."
        )
    return (size,), [f"Only batch {size}: {subject.path.name} is fixed to it."]


def _at(
    batch: int,
    subjects: Sequence[Subject],
    runtime: Runtime,
    threads: int,
    seconds: float,
    memory: Memory,
    progress: Progress | None,
) -> list[Timing]:
    """All models at one batch size."""
    names, twins = _names(subjects), _twins(subjects)
    precisions = (AS_WRITTEN,) if runtime.half is None else (AS_WRITTEN, runtime.half)
    entries: list[_Entry] = []
    start = progress or (lambda *_: lambda __: None)
    tell = start(f"Opening for batch {batch}", len(subjects))
    for index, subject in enumerate(subjects):
        for precision in precisions:
            opened = runtime.open(subject, batch, threads=threads, precision=precision)
            if opened is not None:
                entries.append(_Entry(index, subject, precision, opened))
        tell(1)
    total = max(1, math.ceil(seconds * len(entries)))
    whole = _Whole(start(f"Timing batch {batch}, seconds", total), total)
    found = interleave([e.runner.run for e in entries], seconds, progress=whole.add)
    whole.finish()
    tell = start(f"Memory at batch {batch}", len(entries))
    timings = []
    for entry, rounds in zip(entries, found, strict=True):
        peak = entry.runner.memory
        if peak is None:
            peak = memory(runtime.name, entry.subject, batch, threads, entry.precision)
        tell(1)
        timing = _timing(entry, names[entry.index], batch, rounds, found[0], peak)
        twin = twins.get(entry.index)
        timings.append(timing if twin is None else replace(timing, same_as=names[twin]))
    return timings


class _Whole:
    """Parts of seconds as whole ones, never more than ``total``, which the end reaches."""

    def __init__(self, tell: Callable[[int], None], total: int) -> None:
        self._tell, self._left, self._passed = tell, total, 0.0

    def add(self, seconds: float) -> None:
        """Seconds that went by; whole ones are told."""
        self._passed += seconds
        whole = min(int(self._passed), self._left)
        self._passed -= int(self._passed)
        if whole:
            self._left -= whole
            self._tell(whole)

    def finish(self) -> None:
        """Tell what is left of the time planned."""
        if self._left:
            self._tell(self._left)


def _timing(
    entry: _Entry, name: str, batch: int, rounds: Rounds, reference: Rounds, peak: int | None
) -> Timing:
    q1, median, q3 = quartiles_ms(rounds)
    return Timing(
        model=name,
        path=str(entry.subject.path),
        quantized=entry.subject.quantized,
        bytes=entry.subject.bytes,
        batch=batch,
        precision=entry.precision,
        runs=sum(map(len, rounds)),
        median_ms=median,
        q1_ms=q1,
        q3_ms=q3,
        images_per_second=batch / median * 1e3,
        speedup=speedup(rounds, reference),
        peak_memory_bytes=peak,
    )


def _names(subjects: Sequence[Subject]) -> list[str]:
    """File names, or paths where two files have one name; the same path twice is numbered."""
    short = [s.path.name for s in subjects]
    paths = [str(s.path) for s in subjects]
    alike = {n for n in short if len({p for p, m in zip(paths, short, strict=True) if m == n}) > 1}
    names = [p if n in alike else n for p, n in zip(paths, short, strict=True)]
    return [n if names.index(n) == i else f"{n} ({i + 1})" for i, n in enumerate(names)]


def _twins(subjects: Sequence[Subject]) -> dict[int, int]:
    """The first model with the same bytes, by the index of each that has one before it."""
    seen: dict[str, int] = {}
    first = [seen.setdefault(s.digest, index) for index, s in enumerate(subjects)]
    return {index: other for index, other in enumerate(first) if index != other}
