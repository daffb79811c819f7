"""Without --calib: the embedded model alone runs, wherever it lies; any other gets one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from several_outputs import save_network
from typer.testing import CliRunner

from ptq_onnx.cli.app import app
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, PtqError
from ptq_onnx.pipeline import embedded
from ptq_onnx.pipeline.calibration_curve import measure_curve
from ptq_onnx.pipeline.quantize import quantize

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/digits_vit.onnx"


def test_the_embedded_model_is_known_by_its_content(tmp_path: Path) -> None:
    copy = Path(shutil.copy(MODEL, tmp_path / "mine.onnx"))
    assert embedded.is_embedded(MODEL)
    assert embedded.is_embedded(copy)
    assert embedded.images_for(copy) == ROOT / "img/digits/calib"
    other = save_network(tmp_path / "digits_vit.onnx")
    assert not embedded.is_embedded(other)
    assert not embedded.is_embedded(tmp_path / "nothing.onnx")


def test_an_installed_package_has_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "IMAGES", Path("nowhere"))
    with pytest.raises(ConfigError, match="come with the source, not with the installed"):
        embedded.images_for(MODEL)


@pytest.mark.parametrize("keywords", [{}, {"keep_models": False}, {"scales": "report.json"}])
def test_any_other_is_asked_for_images_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keywords: dict[str, Any]
) -> None:
    from ptq_onnx.preparation import kept

    monkeypatch.setattr(kept, "prepare", lambda *_: pytest.fail("work was done"))
    path = save_network(tmp_path / "m.onnx")
    with pytest.raises(PtqError, match=r"m\.onnx needs calibration images: --calib") as error:
        quantize(path, output=tmp_path / "out", **keywords)
    assert "\n" not in str(error.value)
    with pytest.raises(PtqError, match="needs calibration images: --calib"):
        measure_curve(path, config=QuantizeConfig(), val=ROOT / "img/digits/val")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("verb", ["quantize", "analyse", "calibration-curve"])
def test_commands(verb: str, tmp_path: Path) -> None:
    words = [verb, str(save_network(tmp_path / "m.onnx")), "--output", str(tmp_path / "out")]
    if verb == "calibration-curve":
        words += ["--val", str(ROOT / "img/digits/val")]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ConfigError)
    assert "--calib" in str(done.exception)


def test_scales_need_no_calibration_images(tmp_path: Path) -> None:
    """The scales are there: images to measure on are enough."""
    save_network(tmp_path / "m.onnx", ("logits",))
    config = QuantizeConfig(quantizer="vanilla", images=4, report=False, threads=1, size=(12, 12))
    images = ROOT / "img/digits/calib"
    first = quantize(tmp_path / "m.onnx", config=config, calib=images, output=tmp_path / "a")
    again = quantize(
        tmp_path / "m.onnx",
        config=config,
        val=images,
        scales=first.output / "report.json",
        output=tmp_path / "b",
    )
    files = [(folder / "quantized.onnx").read_bytes() for folder in (first.output, again.output)]
    assert files[0] == files[1]
    assert again.report["fidelity"]["source"] == "val"
