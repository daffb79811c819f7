"""Ranges that the searches find for even values in [-b, b] and one value at each of -1 and 1."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_onnx.calibration.histogram import Histogram
from ptq_onnx.calibration.methods import FROM_HISTOGRAM

SIGNED, UNSIGNED = (-8, 7), (0, 255)


@pytest.mark.parametrize(
    ("method", "count", "bulk", "limits", "low", "high"),
    [
        ("omse", 20_001, 0.105, SIGNED, -0.1, 0.1),  # the last of the hundredths
        ("omse", 20_001, 0.12, SIGNED, -0.11, 0.11),
        ("omse", 200_001, 0.01, SIGNED, -0.00931, 0.00931),
        ("kl", 20_001, 0.1, UNSIGNED, -0.1, 0.1),
        ("kl", 20_001, 0.5, UNSIGNED, -0.5, 0.5),
        ("mse", 20_001, 0.105, SIGNED, -0.1, 0.1),
        ("mse", 200_001, 0.12, SIGNED, -0.11137, 0.11137),
        ("mse", 200_001, 0.05, SIGNED, -0.04689, 0.04689),
        ("mse", 200_001, 0.01, SIGNED, -0.00956, 0.00956),
        ("mse", 200_001, 0.01, UNSIGNED, -0.61678, 0.58016),
    ],
)
def test_range(
    method: str, count: int, bulk: float, limits: tuple[int, int], low: float, high: float
) -> None:
    values = np.r_[np.linspace(-bulk, bulk, count), -1, 1].astype(np.float32)[None]
    histogram = Histogram.over(values.min(axis=1), values.max(axis=1))
    histogram.add(values)
    found = FROM_HISTOGRAM[method](histogram, limits, limits[0] < 0)
    np.testing.assert_allclose(np.ravel(found), [low, high], atol=6e-6)
