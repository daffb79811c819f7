"""The command ``ptq-onnx benchmark``: how fast files run, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from ptq_onnx.cli import options as o
from ptq_onnx.cli.console import progress_bars
from ptq_onnx.cli.terminal import plain, stdout
from ptq_onnx.errors import ConfigError
from ptq_onnx.files.text_file import write_text
from ptq_onnx.pipeline.model_path import find_model

if TYPE_CHECKING:
    from ptq_onnx.targets.timing.results import Benchmark, Timing


def benchmark(
    models: Annotated[
        list[str],
        typer.Argument(metavar="FP32.onnx Q.onnx …", help="The files; the first is the baseline."),
    ],
    runtime: Annotated[
        str | None,
        o.option("--runtime", "NAME", "onnxruntime", "onnxruntime, openvino or tensorrt."),
    ] = None,
    batch: Annotated[
        str | None, o.option("--batch", "N,N,…", "1,8", "Batch sizes, as in 1,8,32.")
    ] = None,
    threads: o.Threads = None,
    seconds: Annotated[
        float | None, o.option("--seconds", "S", "5", "Time for each model and batch size.")
    ] = None,
    as_json: o.Json = False,
    output: Annotated[
        str | None, o.option("--output -o", "FILE", "none", "Write the JSON to a file, too.")
    ] = None,
) -> None:
    """Time model files side by side in the runtime they are meant for."""
    batches = None if batch is None else _sizes(batch)
    paths = [find_model(model, written=True) for model in models]
    target = None if output is None else _target(output, paths)
    from ptq_onnx.targets.timing import benchmark as run
    from ptq_onnx.targets.timing.runtimes import open_runtime

    with progress_bars() as progress:
        found = run.benchmark(
            paths,
            open_runtime(runtime or "onnxruntime"),
            batches=batches,
            threads=threads or 0,
            seconds=run.SECONDS if seconds is None else seconds,
            progress=progress,
        )
    text = json.dumps(found.to_json(), allow_nan=False)
    if target is not None:
        write_text(target, text + "\n")
    if as_json:
        print(text)
        return
    stdout().print(table(found))
    for note in found.notes:
        stdout().say(f"note: {note}")


def table(found: Benchmark) -> Table:
    """A row for each model and batch size, the 16-bit precision in columns of its own."""
    from ptq_onnx.targets.timing.runner import AS_WRITTEN

    written = [t for t in found.timings if t.precision == AS_WRITTEN]
    half = {(t.path, t.batch): t for t in found.timings if t.precision != AS_WRITTEN}
    threads = f"{found.threads} thread{'s' * (found.threads > 1)}"
    threads = threads if found.threads else "its own choice of threads"
    title = f"{found.runtime} {found.version}, {found.device}, {threads}"
    result = Table(  # ten columns fit into 80
        title=title, box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False
    )
    names = ["model", "batch", "median\nms", "IQR\nms", "images/s", "speed-up", "file\nMB"]
    names.append("peak\nMB")
    precision = next((t.precision for t in half.values()), None)
    if precision is not None:
        names += [f"{precision}\nms", f"{precision}\nspeed-up"]
    for index, name in enumerate(names):
        # The name gives way, by lines; a figure never does
        result.add_column(
            name, justify="right" if index else "left", no_wrap=index > 0, overflow="fold"
        )
    for t in written:
        cells = _cells(t, written[0].model)
        if precision is not None:
            other = half.get((t.path, t.batch))
            cells += ["-", "-"] if other is None else [_ms(other.median_ms), _times(other.speedup)]
        result.add_row(*map(plain, cells))
    return result


def _cells(t: Timing, first: str) -> list[str]:
    peak = t.peak_memory_bytes
    return [
        t.model,
        str(t.batch),
        _ms(t.median_ms),
        _ms(t.iqr_ms),
        f"{t.images_per_second:.1f}",
        "same" if t.same_as == first else _times(t.speedup),
        f"{t.bytes / 1e6:.2f}",
        "-" if peak is None else f"{peak / 1e6:.0f}",
    ]


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _times(value: float) -> str:
    return f"{value:.2f}×"


def _sizes(text: str) -> tuple[int, ...]:
    """``1,8,32``. Raises ConfigError."""
    parts = text.split(",")
    if not all(p.strip().isascii() and p.strip().isdigit() and int(p) > 0 for p in parts):
        raise ConfigError(f"--batch {text}: expected batch sizes from 1, as in 1,8,32.")
    return tuple(int(p) for p in parts)


def _target(output: str, models: Sequence[Path]) -> Path:
    """The file to write, refused before anything is timed. Raises ConfigError."""
    path = Path(output)
    if path.exists() and any(path.samefile(model) for model in models if model.exists()):
        raise ConfigError(f"--output {output} is a model to be timed; name another file.")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--output {output}: name a file in a folder that exists.")
    return path
