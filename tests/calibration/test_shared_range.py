"""One range for all channels, chosen from how their records break."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_onnx.calibration.robust import shared_range
from ptq_onnx.calibration.statistics import ChannelStatistics


def statistics(x: np.ndarray) -> ChannelStatistics:
    """Statistics of images [N, T, C], one batch each."""
    found = ChannelStatistics.empty((1, x.shape[-1]))
    for image in x[:, None]:
        power, total = (image.astype(float) ** 2).sum((0, 1)), image.astype(float).sum((0, 1))
        found.update(image.min(1), image.max(1), power, total, image.shape[1])
    return found


def error(x: np.ndarray, low: float, high: float) -> float:
    """Mean squared error of 8 bits over [low, high]."""
    step = (high - low) / 255
    codes = np.clip(np.rint((x - low) / step), 0, 255)
    return float(np.mean((codes * step + low - x) ** 2))


def images(kind: str, count: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = random.normal(0, 1, (count, 20, 256)).astype(np.float32)
    if kind == "rare":  # every channel fires once in a hundred images, far beyond the rest
        fires = random.random((count, 1, 256)) < 0.01
        x[:, :1] += np.where(fires, random.exponential(12, (count, 1, 256)), 0).astype(np.float32)
    return x


def equalised(seen: np.ndarray, unseen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both divided by the largest value of each channel that was seen."""
    largest = np.abs(seen).max(axis=(0, 1))
    return seen / largest, unseen / largest


def test_rare_features_widen_the_range() -> None:
    """On unseen images the range errs less than that of min-max, and is wider."""
    seen, unseen = equalised(images("rare", 48, 0), images("rare", 400, 1))
    found = statistics(seen)
    low, high = shared_range(found, np.ones(256), 256, symmetric=False, exponent=1.0)
    assert high > 1.1 * seen.max()
    assert error(unseen, low, high) < 0.7 * error(unseen, float(seen.min()), float(seen.max()))


def test_without_factors_the_range_is_what_was_seen() -> None:
    x = images("rare", 48, 0)
    found = shared_range(statistics(x), np.ones(256), 256, symmetric=False)
    assert found == (float(x.min()), float(x.max()))


def test_bounded_values_keep_theirs() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (64, 200, 32)).astype(np.float32)
    low, high = shared_range(statistics(x), np.ones(32), 256, symmetric=False, exponent=1)
    assert (low, high) == pytest.approx((float(x.min()), float(x.max())), rel=0.02)


def test_what_was_seen_is_never_clipped() -> None:
    for kind in ("rare", "normal"):
        x = images(kind, 16, 3)
        low, high = shared_range(statistics(x), np.ones(256), 256, symmetric=False, exponent=1)
        assert low <= x.min() < x.max() <= high


def test_symmetric_is_symmetric() -> None:
    low, high = shared_range(
        statistics(images("rare", 16, 3)), np.ones(256), 256, symmetric=True, exponent=1
    )
    assert low == -high < 0


def test_one_image_gives_its_range() -> None:
    x = images("normal", 1, 0)
    found = shared_range(statistics(x), np.ones(256), 256, symmetric=False)
    assert found == (float(x.min()), float(x.max()))


def test_channels_that_nothing_reads_do_not_count() -> None:
    """A channel whose weights are zero may clip: it does not widen the range of the others."""
    x = images("normal", 48, 0)
    x[0, 0, 5] = 6.0
    x[1:, :, 5] *= 0.01
    power = np.ones(256)
    with_it = shared_range(statistics(x), power, 256, symmetric=False, exponent=1)[1]
    power[5] = 0
    assert shared_range(statistics(x), power, 256, symmetric=False, exponent=1)[1] <= with_it
