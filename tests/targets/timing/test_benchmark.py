"""The whole benchmark on a fake runtime: figures, order, notes and refusals."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_runtime import FakeClock, FakeRuntime
from rich.console import Console
from small_graph import SmallGraph, sample

from ptq_onnx.cli.benchmark import table
from ptq_onnx.errors import ConfigError, ModelError
from ptq_onnx.targets.timing import benchmark as module
from ptq_onnx.targets.timing import interleaving
from ptq_onnx.targets.timing.benchmark import benchmark
from ptq_onnx.targets.timing.results import Benchmark, Timing
from ptq_onnx.targets.timing.timed_model import Subject


def model(path: Path, *, batch: int | str = "batch", quantized: bool = False) -> Path:
    """A linear, [batch, 4] → [batch, 5], its input quantized or not."""
    g = SmallGraph((batch, 4))
    g.output_shape = (batch, 5)
    x = "x"
    if quantized:
        x = g("DequantizeLinear", g("QuantizeLinear", "x", 0.1), 0.1)
    return g.save(path, g("MatMul", x, sample(4, 5)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock that the benchmark reads."""
    clock = FakeClock()
    defaults = dict(interleaving.interleave.__kwdefaults__, clock=clock)
    monkeypatch.setattr(interleaving.interleave, "__kwdefaults__", defaults)
    monkeypatch.setattr(module, "flags", lambda: frozenset(("avx512_vnni",)))
    return clock


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [model(tmp_path / "fp32.onnx"), model(tmp_path / "int8.onnx", quantized=True)]


def no_memory(*_: object) -> None:
    return None


def by_key(found: Benchmark) -> dict[tuple[str, int, str], tuple[float, float, float]]:
    return {
        (t.model, t.batch, t.precision): (
            round(t.median_ms, 6),
            round(t.images_per_second, 6),
            round(t.speedup, 6),
        )
        for t in found.timings
    }


def test_figures(clock: FakeClock, files: list[Path]) -> None:
    runtime = FakeRuntime(clock, {"fp32.onnx": 0.2, "int8.onnx": 0.08})
    found = benchmark(files, runtime, batches=(1, 4), threads=3, seconds=0, memory=no_memory)
    assert by_key(found) == {
        ("fp32.onnx", 1, "as written"): (200, 5, 1),
        ("int8.onnx", 1, "as written"): (80, 12.5, 2.5),
        ("fp32.onnx", 4, "as written"): (800, 5, 1),
        ("int8.onnx", 4, "as written"): (320, 12.5, 2.5),
    }
    assert [t.iqr_ms for t in found.timings] == pytest.approx([0] * 4)
    assert [t.bytes for t in found.timings[:2]] == [f.stat().st_size for f in files]
    assert [t.quantized for t in found.timings[:2]] == [False, True]
    assert {threads for _, _, threads, _ in runtime.opened} == {3}
    assert (found.runtime, found.version, found.device, found.threads) == (
        "fake", "1.0", "thin air", 3,
    )  # fmt: skip
    assert found.notes == ("no halves here",)


def test_half_precision_is_timed_beside(clock: FakeClock, files: list[Path]) -> None:
    runtime = FakeRuntime(clock, {"fp32.onnx": 0.2, "int8.onnx": 0.08}, half="fp16", half_note="")
    found = benchmark(files, runtime, batches=(1,), seconds=0, memory=no_memory)
    assert by_key(found) == {
        ("fp32.onnx", 1, "as written"): (200, 5, 1),
        ("fp32.onnx", 1, "fp16"): (100, 10, 2),
        ("int8.onnx", 1, "as written"): (80, 12.5, 2.5),
    }
    assert found.notes == ()


def test_memory_is_asked_for_each_row(clock: FakeClock, files: list[Path]) -> None:
    asked: list[tuple[object, ...]] = []

    def memory(runtime: str, subject: Subject, batch: int, threads: int, precision: str) -> int:
        asked.append((runtime, subject.path.name, batch, threads, precision))
        return 1000 * len(asked)

    runtime = FakeRuntime(clock, {"fp32.onnx": 0.2, "int8.onnx": 0.1})
    found = benchmark(files, runtime, batches=(2,), threads=1, seconds=0, memory=memory)
    assert asked == [
        ("fake", "fp32.onnx", 2, 1, "as written"),
        ("fake", "int8.onnx", 2, 1, "as written"),
    ]
    assert [t.peak_memory_bytes for t in found.timings] == [1000, 2000]


def test_json_shape(clock: FakeClock, files: list[Path]) -> None:
    runtime = FakeRuntime(clock, {"fp32.onnx": 0.2, "int8.onnx": 0.1})
    found = benchmark(files, runtime, batches=(1,), seconds=0, memory=no_memory)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert set(plain) == {
        "runtime", "version", "device", "threads", "seconds", "timings", "notes",
    }  # fmt: skip
    assert set(plain["timings"][1]) == {
        "model", "path", "quantized", "bytes", "batch", "precision", "runs", "median_ms", "q1_ms",
        "q3_ms", "iqr_ms", "images_per_second", "speedup", "peak_memory_bytes", "same_as",
    }  # fmt: skip
    assert plain["timings"][1]["median_ms"] == pytest.approx(100)
    assert plain["timings"][1]["speedup"] == pytest.approx(2)


def test_files_of_one_name_are_told_apart(clock: FakeClock, tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(model(tmp_path / folder / "m.onnx", batch=folder))
    paths += [model(tmp_path / "other.onnx"), paths[0]]
    runtime = FakeRuntime(clock, {"m.onnx": 0.2, "other.onnx": 0.2})
    found = benchmark(paths, runtime, batches=(1,), seconds=0, memory=no_memory)
    assert [t.model for t in found.timings] == [
        str(paths[0]), str(paths[1]), "other.onnx", f"{paths[0]} (4)",
    ]  # fmt: skip


def test_the_same_file_twice_is_no_winner(clock: FakeClock, files: list[Path]) -> None:
    """Under one name or two; the table has no factor for it, and no note praises or blames it."""
    copy = files[0].with_name("copy.onnx")
    copy.write_bytes(files[0].read_bytes())
    runtime = FakeRuntime(clock, {"fp32.onnx": 0.2, "copy.onnx": 0.25, "int8.onnx": 0.1})
    paths = [files[0], copy, files[1], files[1]]
    found = benchmark(paths, runtime, batches=(1,), seconds=0, memory=no_memory)
    assert [t.same_as for t in found.timings] == [None, "fp32.onnx", None, "int8.onnx"]
    told = [note for note in found.notes if "are the same file" in note]
    assert [note.partition(" are")[0] for note in told] == [
        "copy.onnx and fp32.onnx", "int8.onnx (4) and int8.onnx",
    ]  # fmt: skip
    assert not [note for note in found.notes if "does not pay" in note or "gains nothing" in note]
    cells = [str(cell) for cell in table(found).columns[5].cells]
    assert cells == ["1.00×", "same", "2.00×", "2.00×"]


@pytest.mark.parametrize("half", [None, "bf16"])
def test_80_columns_hold_every_figure(half: str | None) -> None:
    name = "a_rather_long_name_of_a_model.onnx"
    plain = Timing(name, name, True, 2_345_678_901, 128, "as written", 5, 12345.6, 1000, 2222.2,
                   12345.6, 10.25, 23_456_000_000)  # fmt: skip
    timings = [plain] if half is None else [plain, replace(plain, precision=half)]
    found = Benchmark("onnxruntime", "1.31.1", "CPU", 1, 5, tuple(timings), ())
    console = Console(width=80, file=io.StringIO())
    console.print(table(found))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    figures = next(line for line in lines if " 128 " in line).split()[1:]
    want = ["128", "12346", "1222", "12345.6", "10.25×", "2345.68", "23456"]
    assert figures == want + ([] if half is None else ["12346", "10.25×"])
    assert name in "".join(line.split()[0] for line in lines if line[1:2].strip())


def test_progress_reaches_its_totals(clock: FakeClock, files: list[Path]) -> None:
    """Neither more nor less, however long the turns are."""
    for seconds, run in ((0.0, 0.2), (3.0, 0.7), (2.0, 0.01)):
        done: dict[str, list[int]] = {}

        def start(stage: str, total: int, done: dict[str, list[int]] = done) -> Callable[..., None]:
            done[stage] = [total, 0]

            def tell(count: int) -> None:
                done[stage][1] += count
                assert done[stage][1] <= total

            return tell

        runtime = FakeRuntime(clock, {"fp32.onnx": run, "int8.onnx": run})
        benchmark(files, runtime, batches=(1,), seconds=seconds, memory=no_memory, progress=start)
        assert len(done) == 3
        assert all(total == reached > 0 for total, reached in done.values())


def test_a_fixed_batch_size_is_the_only_one(clock: FakeClock, tmp_path: Path) -> None:
    paths = [model(tmp_path / "free.onnx"), model(tmp_path / "fixed.onnx", batch=3)]
    runtime = FakeRuntime(clock, {"free.onnx": 0.2, "fixed.onnx": 0.2})
    found = benchmark(paths, runtime, seconds=0, memory=no_memory)
    assert {t.batch for t in found.timings} == {3}
    assert found.notes[0] == "Only batch 3: fixed.onnx is fixed to it."
    assert benchmark(paths, runtime, batches=(3,), seconds=0, memory=no_memory).timings
    with pytest.raises(ConfigError, match=r"--batch 8: .*fixed.onnx is fixed to batches of 3"):
        benchmark(paths, runtime, batches=(3, 8), seconds=0, memory=no_memory)
    paths.append(model(tmp_path / "other.onnx", batch=4))
    with pytest.raises(ConfigError, match="different batch sizes"):
        benchmark(paths, runtime, seconds=0, memory=no_memory)


def test_batch_sizes_without_being_asked(clock: FakeClock, files: list[Path]) -> None:
    runtime = FakeRuntime(clock, {"fp32.onnx": 0.2, "int8.onnx": 0.1})
    found = benchmark(files, runtime, seconds=0, memory=no_memory)
    assert sorted({t.batch for t in found.timings}) == [1, 8]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batches": (0,)}, "--batch"),
        ({"batches": ()}, "--batch"),
        ({"threads": -1}, "--threads"),
        ({"seconds": -1.0}, "--seconds"),
        ({"seconds": float("nan")}, "--seconds"),
    ],
)
def test_refused_options(
    clock: FakeClock, files: list[Path], options: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        benchmark(files, FakeRuntime(clock, {}), **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs model files"):
        benchmark([], FakeRuntime(clock, {}))


def test_a_file_that_is_no_model(clock: FakeClock, tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("no model")
    with pytest.raises(ModelError, match="not an ONNX file"):
        benchmark([path], FakeRuntime(clock, {}))
