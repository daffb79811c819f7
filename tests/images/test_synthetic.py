"""Pictures that are drawn: always the same, 8 bits, and with the statistics of photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ptq_onnx.api import quantize
from ptq_onnx.images.opening import Preprocess
from ptq_onnx.images.source import NoiseSource
from ptq_onnx.images.synthetic import SyntheticSource, picture

PLAIN = Preprocess((0.0,) * 3, (1.0,) * 3, (64, 64))


def slope(image: np.ndarray) -> float:
    """Of log power over log frequency, [H, W]."""
    size = len(image)
    power = np.abs(np.fft.fft2(image - image.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    some = (frequency > 0.03) & (frequency < 0.4)
    return float(np.polyfit(np.log(frequency[some]), np.log(power[some] + 1e-9), 1)[0])


def test_the_seed_alone_decides() -> None:
    source = SyntheticSource(PLAIN, 3)
    first, second = (np.concatenate(list(s.batches(2))) for s in (source, source.reopened()))
    np.testing.assert_array_equal(first, second)
    assert source.names == ["synthetic 0", "synthetic 1", "synthetic 2"]
    assert type(source.reopened(2)) is SyntheticSource
    assert len(source.reopened(2)) == 2
    other = np.concatenate(list(source.drawn(3, 5).batches(3)))
    assert np.abs(other - first).mean() > 0.05
    assert np.abs(first[0] - first[1]).mean() > 0.05


def test_they_are_pictures_of_eight_bits() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    (batch,) = SyntheticSource(Preprocess(mean, std, (64, 64)), 2).batches(2)
    pixels = batch * np.reshape(std, (3, 1, 1)) * 255 + np.reshape(mean, (3, 1, 1)) * 255
    np.testing.assert_allclose(pixels, np.rint(pixels), atol=1e-3)
    assert pixels.min() > -1e-3
    assert pixels.max() < 255.001
    assert SyntheticSource.pictures
    assert not NoiseSource.pictures
    (gray,) = SyntheticSource(Preprocess((0.5,), (0.5,), (32, 48), channels=1), 1).batches(1)
    assert gray.shape == (1, 1, 32, 48)


def test_their_spectrum_is_that_of_photographs() -> None:
    """Power falls with frequency, about as f⁻², where that of noise stays, and colours go
    together."""
    made = [picture(np.random.default_rng((0, i)), 64, 64).astype(float) for i in range(12)]
    assert -3.2 < np.mean([slope(image.mean(axis=2)) for image in made]) < -1.4
    assert abs(slope(np.random.default_rng(0).normal(size=(64, 64)))) < 0.3
    together = [np.corrcoef(i.reshape(-1, 3).T)[0, 1] for i in made]
    assert np.mean(together) > 0.5


def test_a_model_is_calibrated_with_them(tmp_path: Path, short: Path) -> None:
    result = quantize(
        short, output=tmp_path / "out", calib="synthetic", images=8, threads=1, report=False,
        analysis_images=4,
    )  # fmt: skip
    assert result.report["calibration"] == {
        "source": "synthetic", "images": 8, "skipped": [], "method": "robust",
    }  # fmt: skip
    assert sum("that were drawn" in note for note in result.report["notes"]) == 1


def test_a_tiny_picture_has_no_shape_that_is_too_large() -> None:
    assert picture(np.random.default_rng(0), 4, 5).shape == (4, 5, 3)
