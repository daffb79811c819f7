"""Accuracy over the number of calibration images: the figures, the files, the refusals."""

from __future__ import annotations

import inspect
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recorded_progress import Recorded

from ptq_onnx.analysis.comparison_results import Closeness
from ptq_onnx.cli import app as cli
from ptq_onnx.cli import options as cli_options
from ptq_onnx.cli.curve import calibration_curve, table
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.stages import RUNNING_FLOAT
from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.images.source import NOISE
from ptq_onnx.images.synthetic import SYNTHETIC
from ptq_onnx.pipeline.calibration_curve import (
    IMAGES,
    QUANTIZING,
    Curve,
    Point,
    draw_curve,
    measure_curve,
    measure_point,
    write_curve,
)
from ptq_onnx.progress import WHOLE

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "digits_vit.onnx"
DIGITS = ROOT / "img" / "digits"
OWN = {"images", "check_preprocess", "report", "pictures", "attention_blocks", "analysis_images"}
OWN |= {"sensitivity", "multiplier_bits", "gelu", "attention_heads"}
OWN |= {"auto", "max_drop", "min_sqnr"}
"""What the command decides itself, or does not do."""


def curve(top1: float | None = 80.0) -> Curve:
    points = (
        Point(IMAGES, 1, 5.0, 90.0, None if top1 is None else 60.0),
        Point(IMAGES, 4, np.inf, 100.0, top1),
        Point(NOISE, 1, -3.0, 10.0, None if top1 is None else 8.0),
    )
    return Curve("m.onnx", "fqvit", "8/8/8", "robust", 50, top1, points, ("a note",))


def test_figures_of_a_point() -> None:
    point = measure_point(NOISE, 4, Closeness(50.0, 1.6, 50.0), 100.0)
    assert (point.sqnr_db, point.agreement, point.top1) == (1.6, 50, 50)
    assert (point.images, point.source) == (4, NOISE)
    same = measure_point(IMAGES, 1, Closeness(None, 200.0, 100.0), None)
    assert (same.sqnr_db, same.agreement, same.top1) == (np.inf, 100, None)


def test_lines_leave_out_what_is_not_finite() -> None:
    assert curve().line(IMAGES, "sqnr_db") == {1: 5.0}
    assert curve().line(IMAGES, "top1") == {1: 60.0, 4: 80.0}
    assert curve(None).line(IMAGES, "top1") == {}


def test_the_picture_shows_the_points() -> None:
    figure = draw_curve(curve())
    accuracy, sqnr = figure.axes
    drawn = {line.get_label(): line for line in accuracy.get_lines()}
    assert list(drawn) == ["real images", "Gaussian noise", "float"]
    np.testing.assert_array_equal(drawn["real images"].get_xydata(), [[1, 60], [4, 80]])
    np.testing.assert_array_equal(drawn["Gaussian noise"].get_xydata(), [[1, 8]])
    np.testing.assert_array_equal(sqnr.get_lines()[0].get_xydata(), [[1, 5]])
    assert [text.get_text() for text in sqnr.get_xticklabels()] == ["1", "4"]
    assert [a.get_ylabel() for a in draw_curve(curve(None)).axes] == ["SQNR in dB"]


def test_a_hair_of_accuracy_is_not_drawn_as_a_cliff() -> None:
    points = (Point(IMAGES, 1, 1.0, 1.0, 98.0), Point(IMAGES, 4, 1.0, 1.0, 98.2))
    figure = draw_curve(Curve("m", "q", "8/8/8", "m", 9, 98.1, points, ()))
    low, high = figure.axes[0].get_ylim()
    assert high - low == pytest.approx(10)
    assert low < 98 < 98.2 < high


def test_files(tmp_path: Path) -> None:
    picture, data = write_curve(curve(), tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "new")) == [data.name, picture.name]
    assert Image.open(picture).size == (1200, 480)
    found = json.loads(data.read_text())
    assert found["float_top1"] == 80
    assert [p["sqnr_db"] for p in found["points"]] == [5, None, -3]
    assert found["notes"] == ["a note"]


def test_table_has_a_row_for_each_point() -> None:
    assert table(curve()).row_count == 4
    assert table(curve(None)).row_count == 3


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve validation images and a file that is none."""
    folder = tmp_path_factory.mktemp("few")
    for path in sorted((DIGITS / "val").iterdir())[:12]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "a_bad.png").write_bytes(b"no picture")
    return folder


def test_a_curve_of_the_embedded_model(few: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text((DIGITS / "val.txt").read_text() + "a_bad.png 0\n")
    told = Recorded()
    found = measure_curve(
        MODEL,
        config=QuantizeConfig(quantizer="deploy", threads=1),
        val=few,
        calib=DIGITS / "calib",
        labels=labels,
        sizes=(200, 2, 8, 2),
        progress=told,
    )
    assert [(p.source, p.images) for p in found.points] == [
        (IMAGES, 2), (IMAGES, 8), (NOISE, 2), (NOISE, 8), (NOISE, 200),
        (SYNTHETIC, 2), (SYNTHETIC, 8), (SYNTHETIC, 200),
    ]  # fmt: skip
    told.assert_complete()
    assert told.names == [WHOLE, RUNNING_FLOAT, QUANTIZING]
    assert told.stages[2].steps == [1] * 8
    assert found.count == 12
    assert found.notes == ("Left out 200 images: there are 128 to calibrate with.",)
    real, noise = found.line(IMAGES, "sqnr_db"), found.line(NOISE, "sqnr_db")
    assert real[8] > 20
    assert real[8] > real[2]
    assert real[8] > noise[8]
    assert found.float_top1 is not None
    assert found.float_top1 >= 90


def test_a_label_beyond_the_classes(few: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{name} 10\n" for name in os.listdir(few)))
    with pytest.raises(ImageError, match=r"Label 10 .* 10 classes"):
        measure_curve(MODEL, config=QuantizeConfig(), val=few, labels=labels)


def test_auto_is_not_for_curves(few: Path) -> None:
    with pytest.raises(ConfigError, match="use it with quantize"):
        measure_curve(MODEL, config=QuantizeConfig(auto=True), val=few)


def test_options_are_those_of_quantize() -> None:
    names = set(inspect.signature(calibration_curve).parameters)
    options = {f.name for f in fields(QuantizeConfig)} - OWN - {"arithmetic"}
    paths = set(cli_options.PATHS) - {"scales"}
    assert names == options | paths | {"model", "config", "sizes"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((MODEL,), "--val"),
        (("nix.onnx", "--val", DIGITS / "val"), "nix.onnx does not exist"),
        ((MODEL, "--val", "nix"), "'nix' does not exist"),
        ((MODEL, "--val", DIGITS / "val", "--sizes", "1,x"), "as in 1,4,16"),
        ((MODEL, "--val", DIGITS / "val", "--sizes", "0"), "as in 1,4,16"),
        ((MODEL, "--val", DIGITS / "val", "--calib", "noise"), "real images"),
        ((MODEL, "--val", DIGITS / "val", "--calib", "synthetic"), "real images"),
        ((MODEL, "--val", DIGITS / "val", "--calib", "psaq"), "psaq: name real images."),
        ((MODEL, "--val", DIGITS / "val", "--labels", "nix"), "nix"),
        ((MODEL, "--val", DIGITS / "val", "--output", MODEL), "no model is written here"),
        ((MODEL, "--val", DIGITS / "val", "--bits", "9/8/8"), "from 2 to 8"),
    ],
)
def test_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: tuple[object, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ptq-onnx", "calibration-curve", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    text = capsys.readouterr()
    assert (stop.value.code, text.out) == (2, "")
    assert text.err.startswith("error: ")
    assert text.err.count("\n") == 1
    assert said in text.err
    assert os.listdir() == []


def test_command(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    few: Path,
    short: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--calib", DIGITS / "calib", "--val", few, "--sizes", "4", "--output", "out")
    more = ("--quantizer", "vanilla", "--method", "minmax", "--threads", "1")
    argv = ["ptq-onnx", "calibration-curve", short, *words, *more]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    text = capsys.readouterr()
    assert (stop.value.code, text.err) == (0, "")
    assert "SQNR" in text.out
    assert sorted(os.listdir("out")) == ["calibration_curve.json", "calibration_curve.png"]
    found = json.loads(Path("out/calibration_curve.json").read_text())
    assert (found["quantizer"], found["method"], found["float_top1"]) == ("vanilla", "minmax", None)
    assert [(p["source"], p["images"]) for p in found["points"]] == [
        ("images", 4), ("noise", 4), ("synthetic", 4),
    ]  # fmt: skip
