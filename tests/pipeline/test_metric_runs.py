"""A metric in whole runs: report, page, verdict, auto, compare, curve and commands agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from several_outputs import SIZE, save_network
from typer.testing import CliRunner

import ptq_onnx
from ptq_onnx.cli.app import app
from ptq_onnx.errors import ConfigError, ImageError, ModelError
from ptq_onnx.pipeline.calibration_curve import measure_curve
from ptq_onnx.report.page import render
from ptq_onnx.report.schema import report_schema, violations
from ptq_onnx.report.summary import cards, verdict

RNG = np.random.default_rng(3)
QUICK: dict[str, Any] = {"threads": 1, "pictures": False, "check_preprocess": False, "images": 8}
TASK: dict[str, Any] = {"metric": "depth", "metric_option": ("output=depth", "align=affine")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a dense output, pictures, and depths near the model's own as targets."""
    import onnxruntime

    folder = tmp_path_factory.mktemp("metric")
    save_network(folder / "m.onnx", ("depth", "boxes"))
    pictures = RNG.normal(size=(16, 3, SIZE, SIZE)).astype(np.float32)
    np.save(folder / "val.npy", pictures)
    opened = onnxruntime.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    depth = opened.run(["depth"], {"x": pictures})[0]
    np.save(folder / "depths.npy", depth - depth.min() + 2)
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> ptq_onnx.Result:
    return ptq_onnx.quantize(
        place / "m.onnx", calib=place / "val.npy", val=place / "val.npy",
        targets=place / "depths.npy", output=place / "out", **TASK, **QUICK,
    )  # fmt: skip


def test_the_report_says_it_everywhere(run: ptq_onnx.Result) -> None:
    found = run.report["metric"]
    assert violations(run.report, report_schema()) == []
    assert (found["figure"], found["targets"], found["images"]) == ("AbsRel", "depths.npy", 16)
    assert found["float_value"] == pytest.approx(0, abs=1e-6)
    assert 0 < found["value"] < 0.05
    grade, text = verdict(run.report)
    assert text.startswith("The metric")
    assert "AbsRel 0.0000 →" in text
    assert "depths.npy" in text
    assert grade == (
        "good" if found["value"] <= 0.01 else "fair" if found["value"] <= 0.03 else "bad"
    )
    assert cards(run.report)[0][:2] == ("AbsRel", f"0.0000 → {found['value']:.4f}")
    assert "AbsRel 0.0000" in render(run.report, "<svg></svg>", [])
    assert "AbsRel" in repr(run)


def test_evaluate_and_compare_find_the_same(place: Path, run: ptq_onnx.Result) -> None:
    given: dict[str, Any] = {**TASK, "targets": place / "depths.npy", "threads": 1}
    found = ptq_onnx.evaluate(run.output / "quantized.onnx", place / "val.npy", **given)
    assert found.score is not None
    assert found.score.value == pytest.approx(run.report["metric"]["value"], rel=1e-3)
    assert found.score.float_value is None
    table = ptq_onnx.compare([run.output], place / "val.npy", **given)
    assert table.contenders[0].score is None
    assert table.contenders[1].score is not None
    assert table.contenders[1].score.value == pytest.approx(found.score.value, rel=1e-6)
    from ptq_onnx.cli.compare import table as drawn
    from ptq_onnx.report.compare_page import render_comparison

    assert ">AbsRel<" in render_comparison(table)
    assert [c.header for c in drawn(table).columns][1].plain == "AbsRel"


def test_auto_keeps_the_metric(place: Path) -> None:
    """With 3 bits everything is lost; the bound is in the metric's own unit."""
    found = ptq_onnx.quantize(
        place / "m.onnx", calib=place / "val.npy", val=place / "val.npy", bits="3/3/3",
        targets=place / "depths.npy", output=place / "auto", auto=True, max_drop=0.02,
        report=False, **TASK, **QUICK,
    ).report  # fmt: skip
    auto = found["auto"]
    assert (auto["metric"], auto["bound"]) == ("AbsRel", "max_drop")
    assert auto["before"]["drop"] > 0.02 >= auto["after"]["drop"]
    assert auto["after"]["score"] == pytest.approx(found["metric"]["value"], rel=1e-6)


def test_the_curve_draws_it(place: Path) -> None:
    config = ptq_onnx.QuantizeConfig(**TASK, threads=1)
    arrays = str(place / "val.npy")
    found = measure_curve(
        place / "m.onnx", config=config, val=arrays, calib=arrays, sizes=(4,),
        targets=place / "depths.npy",
    )  # fmt: skip
    assert (found.metric, found.unit) == ("AbsRel", "")
    assert all(p.score is not None and 0 < p.score < 1 for p in found.points)
    assert found.float_score == pytest.approx(0, abs=1e-6)
    from ptq_onnx.pipeline.calibration_curve import draw_curve

    assert [axes.get_ylabel() for axes in draw_curve(found).axes] == ["AbsRel", "SQNR in dB"]


def test_as_float_on_the_command_line(place: Path, run: ptq_onnx.Result) -> None:
    words = [
        "evaluate", str(run.output / "quantized.onnx"), "--val", str(place / "val.npy"),
        "--reference", str(place / "m.onnx"), "--metric", "depth", "--threads", "1",
        "--metric-option", "output=depth", "--json",
    ]  # fmt: skip
    found = json.loads(CliRunner().invoke(app, words).stdout)["metric"]
    assert (found["targets"], found["float_value"]) == ("as float", 0.0)
    assert found["value"] > 0
    told = CliRunner().invoke(app, words[:-1]).stdout
    assert "AbsRel, the float model's answers are the truth" in " ".join(told.split())


def test_what_does_not_go_together(place: Path) -> None:
    val, depths = place / "val.npy", place / "depths.npy"
    for options, text, kind in (
        ({"metric": "miou"}, "There is no metric 'miou'; choose one of", ConfigError),
        ({"metric_option": "a=b"}, "belongs to a metric: add --metric", ConfigError),
        ({"metric": "depth", "metric_option": "align"}, "expected KEY=VALUE", ConfigError),
        ({"targets": depths, "metric": "depth"}, "--targets without --val", ConfigError),
        ({"targets": depths, "val": val}, "without --metric", ConfigError),
        ({"metric": "depth", "val": val, "targets": place / "none.npy"},
         "does not exist", ImageError),
        ({"metric": "depth", "metric_option": "align=good"}, "none, median, affine", ConfigError),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            ptq_onnx.quantize(
                place / "m.onnx", calib=place / "val.npy", output=place / "no", **options, **QUICK
            )
    assert not (place / "no").exists()
    with pytest.raises((ConfigError, ModelError), match="needs a truth"):
        ptq_onnx.evaluate(place / "m.onnx", place / "val.npy", metric="depth")
