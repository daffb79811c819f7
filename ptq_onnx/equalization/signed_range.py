"""The range of a tensor without a sign, put around zero for codes that have one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.calibration.robust import shared_range
from ptq_onnx.calibration.statistics import ChannelStatistics
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.codes.uniform import asymmetric_scale

Double = NDArray[np.float64]


def signed_range(
    stats: ChannelStatistics,
    linears: Sequence[ir.Node],
    factor: Double,
    levels: int,
    exponent: float,
) -> tuple[Double, tuple[float, float]]:
    """The shift of each channel [C] before it is divided by ``factor`` [C], and the range then.

    ``stats`` are of the tensor divided by the factor, and ``exponent`` is the power of a channel's
    range in it. Behind the division the shift is the same for all channels: it puts the range
    around zero that one scale and zero point would cover, weighed by the rows of the linears'
    weights.
    """
    weights = [w for w in (constant(n.inputs[1]) for n in linears) if w is not None]
    power = sum(np.sum((w.astype(np.float64) * factor[:, None]) ** 2, axis=1) for w in weights)
    low, high = shared_range(stats, np.asarray(power), levels, symmetric=False, exponent=exponent)
    # Zero stays exact: most of what an activation function gives is close to it, and would be
    # rounded all one way.
    ends = np.array([[low], [high]], np.float32)
    step, zero = asymmetric_scale(ends[0], ends[1], (0, levels - 1))
    middle = levels // 2
    shift = factor * float(step[0]) * (middle - float(zero[0]))
    return shift, (-middle * float(step[0]), (middle - 1) * float(step[0]))
