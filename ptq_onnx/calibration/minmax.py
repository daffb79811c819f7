"""Min-max: the extremes over all calibration images."""

from __future__ import annotations

from ptq_onnx.calibration.statistics import Array, ChannelStatistics


def minmax_range(stats: ChannelStatistics) -> tuple[Array, Array]:
    """Lower and upper bound per row, [R] each."""
    return stats.lowest[0], stats.highest[0]
