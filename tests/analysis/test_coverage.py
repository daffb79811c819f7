"""What of a file runs in integers, counted another way; and what is said of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_graph import SmallGraph, sample

from ptq_onnx.analysis.coverage import Coverage, Left, Share, float_reasons, measure_coverage
from ptq_onnx.cli.console import show
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.images.preprocess import METADATA_KEY, Preprocess
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.preparation.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
DIGITS, CALIB = ROOT / "models/digits_vit.onnx", ROOT / "img/digits/calib"
TOKENS, WIDTH, BLOCKS, PATCHES, PIXELS, CLASSES = 65, 64, 6, 64, 48, 10
QKV, PROJ = 3 * TOKENS * WIDTH * WIDTH, TOKENS * WIDTH * WIDTH
MLP = 4 * TOKENS * WIDTH * WIDTH
PRODUCT = TOKENS * TOKENS * WIDTH
ALL = BLOCKS * (QKV + PROJ + 2 * MLP + 2 * PRODUCT) + PATCHES * PIXELS * WIDTH + WIDTH * CLASSES


def covered(folder: Path, **options: object) -> tuple[dict, list[str]]:
    config = QuantizeConfig(images=8, threads=1, report=False, **options)  # type: ignore[arg-type]
    report = quantize(DIGITS, config=config, output=folder / "out", calib=CALIB).report
    return report["coverage"], report["notes"]


def test_the_embedded_model(tmp_path: Path) -> None:
    found, notes = covered(tmp_path)
    assert found["percent"] == 100
    assert found["linears"] == {"integer": 38, "all": 38}
    assert found["attention"] == {"integer": 12, "all": 12}
    assert found["reasons"] == []
    assert found["warning"] is None
    assert found["basis"] == "optimised graph"
    assert not any("run in integers" in note for note in notes)


def test_what_is_kept_in_float(tmp_path: Path) -> None:
    """By request: counted and named, but no reason to warn."""
    found, _ = covered(tmp_path, keep_float=("fc2", "softmax@0"), equalize=False)
    assert found["linears"] == {"integer": 20, "all": 26}
    assert found["attention"] == {"integer": 11, "all": 12}
    assert found["percent"] == pytest.approx(100 * (1 - (BLOCKS * MLP + PRODUCT) / ALL), abs=0.01)
    assert found["warning"] is None
    share = 100 * BLOCKS * MLP / ALL
    assert found["reasons"][0] == (
        f"in float: 6 linears ({share:.1f} % of the multiplications): kept in float by request."
    )


def test_log2_codes_are_no_integers(tmp_path: Path) -> None:
    found, _ = covered(tmp_path, quantizer="fqvit", rotate=False, lis=True)
    assert found["attention"] == {"integer": 6, "all": 12}
    assert found["percent"] == pytest.approx(100 * (1 - BLOCKS * PRODUCT / ALL), abs=0.01)
    assert "log2" in found["reasons"][0]
    assert found["warning"] is None


@pytest.mark.parametrize("target", ["tensorrt", "openvino", "integer"])
def test_other_targets(target: str, tmp_path: Path) -> None:
    found, _ = covered(tmp_path, target=target, rotate=False)
    assert found["percent"] == 100
    assert found["linears"]["all"] + found["convolutions"]["all"] >= 26
    assert found["convolutions"]["integer"] == found["convolutions"]["all"] == 1


def test_four_bits_are_asked_for(tmp_path: Path) -> None:
    found, notes = covered(tmp_path, weights=4)
    assert found["percent"] == 0
    assert found["warning"] is None
    assert "--weights 4" in found["reasons"][0]
    assert not any("Nothing runs in integers" in note for note in notes)


def convolutions(folder: Path) -> Path:
    """A pyramid of convolutions, and a linear behind it."""
    g = SmallGraph(("batch", 3, 16, 16))
    x = g("Conv", "x", sample(8, 3, 3, 3), np.zeros(8), pads=[1, 1, 1, 1])
    x = g("Conv", g("Relu", x), sample(8, 8, 3, 3), np.zeros(8), pads=[1, 1, 1, 1])
    return g.save(folder / "convolutions.onnx", g("ReduceMean", x, np.array([2, 3]), keepdims=0))


def test_nothing_quantized_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Such a file was written without a word."""
    path = convolutions(tmp_path)
    config = QuantizeConfig(quantizer="vanilla", keep_float=("input",), threads=1, report=False)
    images = sample(4, 3, 16, 16)
    result = quantize(path, config=config, output=tmp_path / "out", calib=[images])
    found = result.report["coverage"]
    both = 16 * 16 * 8 * 9
    assert found["convolutions"]["all"] == 2
    assert found["percent"] in (0.0, pytest.approx(100 * 8 * both / (11 * both)))
    show(result)
    shown = capsys.readouterr().out
    assert f"In integers: {found['percent']:.1f} % of the multiplications" in shown


def test_texts() -> None:
    why = "ONNX Runtime has no integer kernel for a convolution whose output stays float"
    none = Coverage(
        Share(0, 0), Share(0, 57), Share(0, 0), 0.0,
        (Left("convolutions", 57, 100.0, why),), "optimised graph",
    )  # fmt: skip
    assert none.line == "In integers: 0.0 % of the multiplications (0 of 57 convolutions)."
    assert none.warning is not None
    assert none.warning.startswith("Nothing runs in integers: every product")
    some = Coverage(
        Share(2, 2), Share(0, 1), Share(8, 8), 89.9, (Left("convolutions", 1, 10.1, why),), "Q/DQ"
    )
    assert some.warning is not None
    assert some.warning.startswith("Only 89.9 % of the multiplications run in integers")
    assert f"1 convolution, {why}" in some.warning
    assert Coverage(Share(1, 1), Share(0, 1), Share(0, 0), 90.0, some.left, "Q/DQ").warning is None


def test_reasons_by_product() -> None:
    floats = {"a": "stays float: another input", "b": "kept in float by request", "c": "other"}
    readers = {"a": ("fc1", "qk"), "b": ("fc1",), "c": ("fc1",)}
    found = float_reasons(floats, readers)
    assert found["fc1"] == found["fc1_matmul"] == "kept in float by request"
    assert found["qk"] == "stays float: another input"


def test_windows_count_as_often_as_they_are(tmp_path: Path) -> None:
    """[6*batch, …] holds six windows an image."""
    g = SmallGraph(("batch", 3, 8, 8))
    windows = g("Reshape", "x", np.array([-1, 4, 8]))
    inside = g("MatMul", windows, sample(8, 8))
    whole = g("Reshape", inside, np.array([-1, 24, 8]))
    path = g.save(tmp_path / "windows.onnx", g("MatMul", whole, sample(8, 8, seed=1)))
    graphs.save(prepare(path).model, path)
    found = measure_coverage(path, "tensorrt", {"/matmul1": "kept in float by request"})
    assert found.linears == Share(0, 2)
    assert sorted(one.percent for one in found.left) == [50.0, 50.0]


def test_open_sides_count_as_those_of_the_images(tmp_path: Path) -> None:
    """Behind a mean over the picture are products that do not grow with it: of 4 × 3 · 9 · 64
    multiplications at 8 × 8 pixels and 16 behind them only the latter are linears."""
    g = SmallGraph(("batch", 3, "height", "width"))
    seen = g("Conv", "x", sample(4, 3, 3, 3), pads=[1, 1, 1, 1])
    mean = g("Flatten", g("GlobalAveragePool", seen))
    path = g.save(tmp_path / "open.onnx", g("MatMul", mean, sample(4, 4, seed=1)))
    model = graphs.load(path)
    whole = 4 * 3 * 9 * 8 * 8
    model.metadata_props[METADATA_KEY] = Preprocess((0.5,) * 3, (0.5,) * 3, (8, 8)).to_json()
    graphs.save(model, path)
    found = measure_coverage(path, "tensorrt")
    percent = {one.kind: one.percent for one in found.left}
    assert percent["convolutions"] == pytest.approx(100 * whole / (whole + 16))
