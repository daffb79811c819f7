"""Calibration: from statistics of float tensors to clip ranges.

The methods, in the order in which the command line names them. Those of ``FROM_EXTREMES``
need per-image extremes only; those of ``FROM_HISTOGRAM`` a second run over the images.
"""

from __future__ import annotations

from collections.abc import Callable

from ptq_onnx.calibration.ema import ema_range
from ptq_onnx.calibration.kl import kl_range
from ptq_onnx.calibration.minmax import minmax_range
from ptq_onnx.calibration.mse import mse_range
from ptq_onnx.calibration.omse import omse_range
from ptq_onnx.calibration.percentile import percentile_range
from ptq_onnx.calibration.robust import robust_range
from ptq_onnx.calibration.statistics import (
    Array,
    ChannelStatistics,
    Histogram,
    Statistics,
    add_histograms,
    collect,
)

FROM_EXTREMES: dict[str, Callable[[ChannelStatistics], tuple[Array, Array]]] = {
    "minmax": minmax_range,
    "ema": ema_range,
    "robust": robust_range,
}
FROM_HISTOGRAM: dict[str, Callable[[Histogram, tuple[int, int], bool], tuple[Array, Array]]] = {
    "percentile": percentile_range,
    "omse": omse_range,
    "mse": mse_range,
    "kl": kl_range,
}


def ranges(
    statistics: Statistics,
    tensor: str,
    method: str,
    limits: tuple[int, int],
    *,
    symmetric: bool,
    per_channel: bool,
) -> tuple[Array, Array]:
    """Lower and upper bound of a tensor, [C] per channel or [1], by the method's name."""
    if method in FROM_HISTOGRAM:
        histogram = statistics.histograms[tensor]
        return FROM_HISTOGRAM[method](histogram, limits, symmetric)
    stats = statistics.channels[tensor]
    return FROM_EXTREMES[method](stats if per_channel else stats.pooled())


__all__ = [
    "FROM_EXTREMES",
    "FROM_HISTOGRAM",
    "ChannelStatistics",
    "Histogram",
    "Statistics",
    "add_histograms",
    "collect",
    "ranges",
]
