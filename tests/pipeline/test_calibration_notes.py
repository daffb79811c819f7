"""What a quantization says about its calibration images: noise, preprocessing, growing ranges."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.images.preprocess import Preprocess
from ptq_onnx.images.source import NoiseSource
from ptq_onnx.pipeline.quantize import quantize

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "digits_vit.onnx"
DIGITS = ROOT / "img" / "digits"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded images, as a user's own."""
    return Path(shutil.copytree(DIGITS / "calib", tmp_path_factory.mktemp("own") / "calib"))


def report(calib: Any, output: Path, model: Path = MODEL, **options: Any) -> dict[str, Any]:
    config = QuantizeConfig(**{"images": 16, "report": False, "threads": 1, **options})
    return quantize(model, config=config, calib=calib, output=output).report


def test_noise_is_standard_normal_and_always_the_same() -> None:
    source = NoiseSource(Preprocess.named("imagenet", 32), 20)
    (images,) = source.batches(20)
    assert (images.shape, images.dtype) == ((20, 3, 32, 32), np.float32)
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02
    assert len({image.tobytes() for image in images}) == 20
    again = np.concatenate(list(NoiseSource(source.preprocess, 20).batches(3)))
    np.testing.assert_array_equal(images, again)
    assert (len(source), len(set(source.names)), source.skipped) == (20, 20, [])


def test_calibration_with_noise(tmp_path: Path, short: Path) -> None:
    found = report("noise", tmp_path / "a", short, images=5)
    assert found["calibration"]["source"] == "noise"
    assert found["calibration"]["images"] == 5
    assert any("Gaussian noise" in note for note in found["notes"])
    assert found["preprocess_check"] is None
    again = report("noise", tmp_path / "b", short, images=5)
    assert again["tensors"] == found["tensors"]


def test_a_folder_called_noise_has_a_path(
    tmp_path: Path, folder: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "noise")
    found = report("./noise", tmp_path / "a", short)
    assert found["calibration"]["skipped"] == []
    assert not any("Gaussian" in note for note in found["notes"])


def test_the_normalisation_of_the_model_is_not_doubted(tmp_path: Path, folder: Path) -> None:
    found = report(folder, tmp_path / "a")
    check = found["preprocess_check"]
    assert check["warning"] is None
    assert 0.5 < check["in_force"]["confidence"] <= 1
    assert len(check["others"]) >= 4
    assert not any("preprocessing" in note for note in found["notes"])


@pytest.mark.parametrize("images", [4, 32])
def test_a_wrong_normalisation_is_a_note(tmp_path: Path, folder: Path, images: int) -> None:
    """However few images calibration takes: the folder has more."""
    found = report(folder, tmp_path / "a", preprocess="imagenet", images=images)
    assert found["preprocess_check"]["warning"] in found["notes"]
    assert "--preprocess inception" in found["preprocess_check"]["warning"]


def test_where_the_check_has_nothing_to_say(tmp_path: Path, folder: Path, short: Path) -> None:
    off = report(folder, tmp_path / "a", short, check_preprocess=False)
    arrays = report(np.zeros((4, 3, 32, 32), np.float32), tmp_path / "b", short, images=4)
    embedded = report(None, tmp_path / "c")
    assert [r["preprocess_check"] for r in (off, arrays, embedded)] == [None] * 3


def test_ranges_that_still_grow_are_a_note(tmp_path: Path, folder: Path) -> None:
    steady = report(folder, tmp_path / "a", images=128, check_preprocess=False)
    assert not any("still grew" in note for note in steady["notes"])
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(12):  # gray, then black and white
        pixels = np.full((32, 32), 128, np.uint8)
        if index >= 8:
            pixels[8:24, 12:20] = 255
            pixels[:4] = 0
        Image.fromarray(pixels).save(pictures / f"{index:02d}.png")
    growing = report(pictures, tmp_path / "b", check_preprocess=False)
    (note,) = (n for n in growing["notes"] if "still grew" in n)
    assert "over the last third" in note
    assert "--images" in note
