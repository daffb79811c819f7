"""Files of several models, or of several preprocessings, are not compared without a word."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from ptq_onnx import QuantizeConfig, open_images, quantize, resolve_preprocess
from ptq_onnx.analysis.compare import compare
from ptq_onnx.errors import ConfigError
from ptq_onnx.images.preprocess import Preprocess

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/digits_vit.onnx"
CALIB, VAL = ROOT / "img/digits/calib", ROOT / "img/digits/val"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, short: Path) -> Path:
    config = QuantizeConfig(images=8, report=False, threads=1)
    out = tmp_path_factory.mktemp("same") / "a"
    return quantize(short, config=config, calib=CALIB, output=out).output


def other(run: Path, name: str) -> Path:
    folder = run.with_name(name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder)
    return folder


def test_another_float_model_is_refused(run: Path) -> None:
    folder = other(run, "b")
    proto = onnx.load(folder / "fused.onnx")
    weight = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
    array = onnx.numpy_helper.to_array(weight)
    weight.raw_data = np.ascontiguousarray(array[..., ::-1]).tobytes()
    onnx.save(proto, folder / "fused.onnx")
    images = open_images(VAL, resolve_preprocess(MODEL, QuantizeConfig()), 4)
    with pytest.raises(ConfigError, match=r"^b was made from another float model than .*a/fused"):
        compare([run, folder], images, threads=1)


def test_another_preprocessing_is_named(run: Path) -> None:
    folder = other(run, "c")
    own = Preprocess.named("imagenet", 32)
    proto = onnx.load(folder / "quantized.onnx")
    (entry,) = [p for p in proto.metadata_props if p.key == "ptq_onnx.preprocess"]
    entry.value = own.to_json()
    onnx.save(proto, folder / "quantized.onnx")
    images = open_images(VAL, resolve_preprocess(MODEL, QuantizeConfig()), 4)
    found = compare([run, folder], images, threads=1, block_images=4)
    assert found.notes == (
        f"Preprocessing: {images.preprocess.described}.",
        "c was made with another preprocessing: imagenet, 32x32, crop 0.875, bicubic. Its figures"
        " here are not those of its own run.",
    )


def test_few_images_are_told(tmp_path: Path, short: Path) -> None:
    config = QuantizeConfig(images=1, report=False, threads=1)
    result = quantize(short, config=config, calib=CALIB, output=tmp_path / "o")
    assert result.report["notes"][0].startswith("Calibrated on 1 image only, which hardly show")
