"""The whole benchmark: models × batch sizes × precisions, in one runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptq_onnx.benchmarking.advice import advice
from ptq_onnx.benchmarking.cpu import flags
from ptq_onnx.benchmarking.interleaving import interleave
from ptq_onnx.benchmarking.memory import peak_memory
from ptq_onnx.benchmarking.results import Benchmark, Rounds, Timing, quartiles_ms, speedup
from ptq_onnx.benchmarking.runner import AS_WRITTEN, Runner, Runtime
from ptq_onnx.benchmarking.subject import Subject, read_subject
from ptq_onnx.errors import ConfigError

BATCHES = (1, 8)
"""The batch sizes where none are asked for."""
SECONDS = 5.0

Memory = Callable[[str, Subject, int, int, str], int | None]
Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class _Entry:
    """What takes part in the rounds of one batch size."""

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
    names = _names(subjects)
    precisions = (AS_WRITTEN,) if runtime.half is None else (AS_WRITTEN, runtime.half)
    entries: list[_Entry] = []
    for subject in subjects:
        for precision in precisions:
            opened = runtime.open(subject, batch, threads=threads, precision=precision)
            if opened is not None:
                entries.append(_Entry(subject, precision, opened))
    start = progress or (lambda *_: lambda __: None)
    tell = start(f"Batch {batch}: seconds", math.ceil(seconds * len(entries)))
    found = interleave([e.runner.run for e in entries], seconds, progress=_whole(tell))
    tell = start(f"Batch {batch}: memory", len(entries))
    timings = []
    for entry, rounds in zip(entries, found, strict=True):
        peak = entry.runner.memory
        if peak is None:
            peak = memory(runtime.name, entry.subject, batch, threads, entry.precision)
        tell(1)
        name = names[subjects.index(entry.subject)]
        timings.append(_timing(entry, name, batch, rounds, found[0], peak))
    return timings


def _whole(tell: Callable[[int], None]) -> Callable[[float], None]:
    """Parts of seconds as whole ones."""
    left = 0.0

    def add(seconds: float) -> None:
        nonlocal left
        left += seconds
        tell(int(left))
        left -= int(left)

    return add


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
    """File names, or paths where two files have one name."""
    short = [s.path.name for s in subjects]
    return short if len(set(short)) == len(short) else [str(s.path) for s in subjects]
