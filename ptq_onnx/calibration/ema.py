"""Exponential moving average of the images' extremes (Jacob et al., CVPR 2018).

FQ-ViT's observer averages the extremes of batches with momentum 0.99. The largest value of a batch
grows with the batch; averaged here are single images, so that the batch size changes nothing. The
order of the images does: the last hundred count most, and of fewer than that, the first.
"""

from __future__ import annotations

from ptq_onnx.calibration.statistics import Array, ChannelStatistics


def ema_range(stats: ChannelStatistics) -> tuple[Array, Array]:
    """Lower and upper bound per row, [R] each; momentum 0.99 an image."""
    return stats.ema_low, stats.ema_high
