"""Exponential moving average of the extremes of the batches (Jacob et al., CVPR 2018)."""

from __future__ import annotations

from ptq_onnx.calibration.statistics import Array, ChannelStatistics


def ema_range(stats: ChannelStatistics) -> tuple[Array, Array]:
    """Lower and upper bound per row, [R] each; momentum 0.9 a batch."""
    return stats.ema_low, stats.ema_high
