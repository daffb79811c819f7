"""Progress: every stage of every job ends at its total, and a terminal shows it."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_progress import Recorded

from ptq_onnx.analysis.compare import MEASURING, TIMING, compare
from ptq_onnx.config import stages
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError
from ptq_onnx.images.opening import open_images
from ptq_onnx.pipeline.preprocessing import resolve_preprocess
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.progress import UNITS, WHOLE, Planned, Stages

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models/digits_vit.onnx"
CALIB, VAL = ROOT / "img/digits/calib", ROOT / "img/digits/val"
IMAGES = 8

# --- stages by themselves


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 40), st.integers(0, 60))),
    st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0.1, 9), st.booleans())),
)
def test_whatever_comes_every_stage_ends_at_its_total(
    jobs: list[tuple[str, int, int]], plan: list[tuple[str, float, bool]]
) -> None:
    """Too few steps, too many, stages that no plan has, or that come twice."""
    told = Recorded()
    begin = Stages(told)
    begin.plan([Planned(*one) for one in plan])
    for name, total, steps in jobs:
        advance = begin(name, total)
        for _ in range(steps):
            advance(1)
    begin.done()
    for stage, (name, total, steps) in zip(told.stages[1:], jobs, strict=True):
        assert (stage.name, stage.total, sum(stage.steps)) == (name, total, total)
        assert stage.steps[: min(steps, total)] == [1] * min(steps, total)
    assert sum(told.stages[0].steps) == UNITS


def test_the_whole_job_moves_by_the_plan() -> None:
    told = Recorded()
    begin = Stages(told, [Planned("a", 1), Planned("left out", 5), Planned("b", 3)])
    whole = told.stages[0].steps
    advance = begin("a", 2)
    advance(1)
    assert sum(whole) == UNITS * 0.5 / 9 // 1
    begin("b", 4)(2)
    assert sum(whole) == pytest.approx(UNITS * (6 + 1.5) / 9, abs=1)
    begin("unknown", 7)(7)
    assert sum(whole) == UNITS
    begin.done()
    told.assert_complete()


def test_a_stage_that_comes_again_leaves_room() -> None:
    told = Recorded()
    begin = Stages(told, [Planned("rounds", 1, open=True), Planned("end", 1)])
    seen = []
    for _ in range(3):
        begin("rounds", 5)(5)
        seen.append(sum(told.stages[0].steps))
    assert 0 < seen[0] < seen[1] < seen[2] < UNITS / 2
    begin.done()
    told.assert_complete()


# --- jobs


def run(tmp_path: Path, model: Path = MODEL, **options: Any) -> Recorded:
    told = Recorded()
    paths = {k: options.pop(k) for k in ("val", "labels") if k in options}
    config = QuantizeConfig(**{"images": IMAGES, "analysis_images": 4, "threads": 1, **options})
    quantize(model, config=config, calib=CALIB, output=tmp_path / "o", progress=told, **paths)
    return told


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"report": False},
            [stages.EQUALISING, stages.WRITING, stages.REPORTING],
        ),
        (
            {"quantizer": "vanilla", "per_channel": ("auto",), "pictures": False},
            [stages.CHANNELS, stages.CALIBRATING, stages.HISTOGRAMS, stages.WRITING,
             stages.EVERY_OP, stages.VARIATION, stages.ATTENTION, stages.REPORTING],
        ),
        ({"quantizer": "vanilla", "report": True}, [stages.DRAWING]),
        ({"rounding": "gptq", "bits": "4/8/8", "report": False}, [stages.ROUNDING]),
        ({"method": "pearson", "report": False}, [stages.SCALES]),
        ({"weights": 4, "report": False}, [stages.CALIBRATING]),
        ({"report": False, "val": VAL, "labels": ROOT / "img/digits/val.txt"},
         [stages.MEASURING]),
    ],
)  # fmt: skip
def test_quantize(
    tmp_path: Path, short: Path, options: dict[str, Any], expected: list[str]
) -> None:
    told = run(tmp_path, short, **options)
    told.assert_complete()
    assert told.names[:2] == [WHOLE, stages.READING]
    wanted = [name for name in told.names if name in expected]
    assert wanted == expected
    # Every one is told of by its own steps, not filled up at its end.
    for stage in told.stages:
        if stage.name in (stages.CALIBRATING, stages.EQUALISING, stages.ROUNDING):
            assert stage.steps == [8] * (stage.total // 8)


def test_analyse_and_auto(tmp_path: Path, short: Path) -> None:
    few = {"model": short, "quantizer": "vanilla", "analysis_images": 2}
    told = run(tmp_path / "a", sensitivity=True, pictures=False, **few)
    told.assert_complete()
    (modules,) = [s for s in told.stages if s.name == stages.MODULES]
    assert len(modules.steps) > 30
    told = run(tmp_path / "b", auto=True, min_sqnr=40, report=False, **few)
    told.assert_complete()
    assert {stages.RUNNING_FLOAT, stages.EXPECTING, stages.ENOUGH, stages.TAKING_BACK} <= {
        *told.names
    }


def test_compare(tmp_path: Path, short: Path) -> None:
    run(tmp_path, short, report=False)
    told = Recorded()
    few = open_images(VAL, resolve_preprocess(MODEL, QuantizeConfig()), limit=10)
    compare([tmp_path / "o"], few, batch=4, threads=1, progress=told)
    told.assert_complete()
    assert told.names == [WHOLE, stages.READING, TIMING, MEASURING]
    assert told.stages[3].steps == [4, 4, 2, 4, 4, 2]


def test_unreadable_images_and_errors(tmp_path: Path, short: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(CALIB.iterdir())[:5]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "bad.png").write_bytes(b"no picture")
    told = Recorded()
    config = QuantizeConfig(report=False, threads=1)
    quantize(short, config=config, calib=folder, output=tmp_path / "o", progress=told)
    told.assert_complete()
    told = Recorded()
    with pytest.raises(ConfigError):
        quantize(short, config=config, calib=folder, output=folder / "bad.png", progress=told)
    assert sum(told.stages[0].steps) < UNITS


# --- a terminal of 80 columns

LINE = re.compile(r"^(?P<name>\S.*?) +[━╸╺ ]+ +(?P<done>\d+)(?:/(?P<total>\d+)| %) (?P<clock>\S+)$")


def on_terminal(command: list[str]) -> tuple[float, str]:
    """Seconds until something was on the screen, and all that was written, without colours."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm", "NO_COLOR": "1"}
    begun = time.monotonic()
    process = subprocess.Popen(
        command, stdin=follower, stdout=subprocess.DEVNULL, stderr=follower, env=environment
    )
    os.close(follower)
    data, first = b"", 0.0
    while True:
        ready, _, _ = select.select([leader], [], [], 300)
        try:
            part = os.read(leader, 65536) if ready else b""
        except OSError:  # closed by the other side
            part = b""
        if not part:
            break
        first = first or time.monotonic() - begun
        data += part
    os.close(leader)
    assert process.wait() == 0
    return first, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode())


def test_on_a_terminal_every_bar_ends_at_its_total(short: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ptq_onnx", "quantize", str(short), "--calib", str(CALIB),
               "--images", "16", "--no-report", "--output", str(tmp_path / "o"),
               "--threads", "1"]  # fmt: skip
    _, text = on_terminal(command)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert lines[0].startswith("Starting")  # before anything heavy is imported
    assert all(len(line) <= 80 for line in lines)
    last: dict[str, re.Match[str]] = {}
    for line in lines:
        found = LINE.match(line)
        if found is not None:
            last[found["name"].strip()] = found
    assert list(last)[-1] == stages.REPORTING or WHOLE in last
    assert {stages.READING, stages.LOADING, stages.EQUALISING, stages.WRITING, WHOLE} <= {*last}
    for name, found in last.items():
        assert found["done"] == (found["total"] or "100"), name


def test_in_a_pipe_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c",
               "import sys; from ptq_onnx.cli.console import progress_bars\n"
               "with progress_bars() as p: print(p)"]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("None\n", "")
