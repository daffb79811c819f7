"""Calibration: from statistics of float tensors to clip ranges.

The methods, in the order in which the command line names them. Those of ``FROM_EXTREMES``
need per-image extremes only; those of ``FROM_HISTOGRAM`` a second run over the images. Those of
``FROM_PRODUCTS`` search the scale that the extremes give, by a score of the products that read
the tensor (quantizers/scale_search.py); a tensor that others read takes ``FALLBACK``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.calibration.ema import ema_range
from ptq_onnx.calibration.kl import kl_range
from ptq_onnx.calibration.minmax import minmax_range
from ptq_onnx.calibration.mse import mse_range
from ptq_onnx.calibration.omse import omse_range
from ptq_onnx.calibration.pearson import correlation
from ptq_onnx.calibration.percentile import percentile_range
from ptq_onnx.calibration.ranking import ranked_correlation
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

Score = Callable[[Array, Array, NDArray[np.float64]], NDArray[np.float64]]
"""From a float output, candidates for it and the weight of its rows to their scores."""
FROM_PRODUCTS: dict[str, Score] = {"pearson": correlation, "ranking": correlation}
OF_LOGITS: dict[str, Score] = FROM_PRODUCTS | {"ranking": ranked_correlation}
"""Those of attention logits, QKᵀ."""
FALLBACK = "robust"


def ranges(
    statistics: Statistics,
    tensor: str,
    method: str,
    limits: tuple[int, int],
    *,
    symmetric: bool,
    per_channel: bool,
) -> tuple[Array, Array]:
    """Lower and upper bound of a tensor, [C] per channel or [1], by the method's name; of a
    method of ``FROM_PRODUCTS`` those that its search starts from."""
    if method in FROM_HISTOGRAM:
        histogram = statistics.histograms[tensor]
        return FROM_HISTOGRAM[method](histogram, limits, symmetric)
    stats = statistics.channels[tensor]
    bounds = minmax_range if method in FROM_PRODUCTS else FROM_EXTREMES[method]
    return bounds(stats if per_channel else stats.pooled())


__all__ = [
    "FALLBACK",
    "FROM_EXTREMES",
    "FROM_HISTOGRAM",
    "FROM_PRODUCTS",
    "OF_LOGITS",
    "ChannelStatistics",
    "Histogram",
    "Score",
    "Statistics",
    "add_histograms",
    "collect",
    "ranges",
]
