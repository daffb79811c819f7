"""Calibration images drawn at random: by the seed alone, without replacement, the rest held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError
from ptq_onnx.images.opening import ImageSource, Preprocess, open_images
from ptq_onnx.images.source import NoiseSource, at_random
from ptq_onnx.pipeline.quantize import quantize

PLAIN = Preprocess((0.0,) * 3, (1.0,) * 3, (8, 8))
COUNT = 30


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same images as a folder, an array file, an archive and pictures."""
    folder = tmp_path_factory.mktemp("drawn")
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
    (folder / "files").mkdir()
    for index, one in enumerate(pixels):
        Image.fromarray(one).save(folder / f"files/{index:02d}.png")
    np.save(folder / "a.npy", pixels)
    np.savez_compressed(folder / "a.npz", images=pixels)
    pictures = [Image.fromarray(one) for one in pixels]
    return {"files": folder / "files", "npy": folder / "a.npy", "npz": folder / "a.npz",
            "pictures": pictures}  # fmt: skip


def pixels_of(source: ImageSource) -> np.ndarray[Any, Any]:
    return np.concatenate(list(source.batches(4)))


@pytest.mark.parametrize("kind", ["files", "npy", "npz", "pictures"])
def test_the_same_images_wherever_they_lie(places: dict[str, Any], kind: str) -> None:
    whole = pixels_of(open_images(places[kind], PLAIN))
    for seed in (0, 1):
        found = open_images(places[kind], PLAIN, 7).drawn(7, seed)
        index = at_random(COUNT, 7, seed)
        np.testing.assert_array_equal(pixels_of(found), whole[index])
        others = found.others(COUNT)
        assert others is not None
        assert sorted([*found.names, *others.names]) == sorted(
            open_images(places[kind], PLAIN).names
        )
        assert len(found.reopened()) == COUNT


def test_drawn_without_replacement_in_order() -> None:
    found = [at_random(COUNT, 10, seed) for seed in range(4)]
    assert len({tuple(one) for one in found}) == 4
    for one in found:
        assert one == sorted(set(one))
        assert len(one) == 10
    assert at_random(COUNT, 99, 3) == list(range(COUNT))
    every = np.bincount(np.concatenate([at_random(COUNT, 10, s) for s in range(300)]))
    assert 60 < every.min() <= every.max() < 145  # 100 each, six standard errors apart at most


def test_noise_of_another_seed() -> None:
    plain = NoiseSource(PLAIN, 4)
    one, other, again = (pixels_of(plain.drawn(4, seed)) for seed in (1, 2, 1))
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(pixels_of(plain), pixels_of(plain.drawn(4, 0)))


def test_the_option(places: dict[str, Any], short: Path, tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> dict[str, Any]:
        config = QuantizeConfig(quantizer="channelwise", report=False, threads=1, **options)
        return quantize(short, config=config, calib=places["files"], output=tmp_path / name).report

    drawn = [run(str(i), images=6, seed=seed) for i, seed in enumerate((0, 1, 0))]
    assert drawn[0]["tensors"] == drawn[2]["tensors"]
    assert drawn[0]["tensors"] != drawn[1]["tensors"]
    assert not any("draws nothing" in note for note in drawn[0]["notes"])
    (told,) = [n for n in run("all", images=COUNT, seed=3)["notes"] if "--seed" in n]
    assert told == (
        "--seed 3 draws nothing: all 30 images calibrate; give fewer with --images, or more to draw"
        " from."
    )


def test_a_seed_is_a_whole_number() -> None:
    with pytest.raises(ConfigError, match=r"--seed must be at least 0, got -1"):
        QuantizeConfig(seed=-1)
    with pytest.raises(ConfigError, match="--seed x: must be a whole number"):
        QuantizeConfig(seed="x")  # type: ignore[arg-type]
