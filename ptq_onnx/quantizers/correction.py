"""Bias correction: takes the mean error of quantized weights out of the bias.

E[x Ŵ] - E[x W] = E[x] (Ŵ - W) is known from the mean of the linear's input over the
calibration images, and subtracted from the bias. Source of the idea: Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction" (arXiv 1906.04721), section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import is_convolution, rows_in_weight, rows_of
from ptq_onnx.blocks.walking import is_linear, name_of
from ptq_onnx.calibration.methods import ChannelStatistics, Statistics
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.fake_quantize import dequantize, quantize
from ptq_onnx.numerics.spec import Site, TensorSpec
from ptq_onnx.quantizers.solved_specs import trim

Double = NDArray[np.float64]


def corrected_biases(
    model: ir.Model,
    sites: Mapping[str, Site],
    specs: Mapping[str, TensorSpec],
    statistics: Statistics,
    rounded: Mapping[str, NDArray[np.float32]] | None = None,
    means: Mapping[str, Double] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """New biases [N] of all linears with quantized weight and a known input mean, by name of
    the bias. A linear without a bias, or with one that others share, is left alone. ``rounded``
    holds, by name, the weights that are quantized in place of the model's own, ``means`` what E[x]
    they were rounded with."""
    found: dict[str, NDArray[np.float32]] = {}
    for node in model.graph:
        mean = corrected_mean(node, sites, statistics)
        if mean is None and is_convolution(node):
            mean = pixel_mean(node, statistics)
        if mean is None:
            continue
        weight, bias = node.inputs[1], node.inputs[2]
        value, old = constant(weight), constant(bias)
        spec = None if weight is None else specs.get(str(weight.name))
        if weight is None or bias is None or value is None or old is None or spec is None:
            continue
        exact = np.asarray(value, np.float32)
        mean = (means or {}).get(str(weight.name), mean)
        quantized = (rounded or {}).get(str(weight.name), exact)
        if is_convolution(node):
            mean = np.asarray(rows_in_weight(node, mean.astype(np.float32)), np.float64)
        found[str(bias.name)] = corrected_bias(
            exact, np.asarray(old, np.float32), spec, mean, quantized
        )
    return found


def corrected_bias(
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    spec: TensorSpec,
    mean: Double,
    quantized: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """b - E[x] (Ŵ - W) for weight [K, N], bias [N] and input mean [K]; of a convolution's weight
    [N, C, …] the mean in the shape in which it multiplies it. Ŵ is ``quantized`` in codes, or the
    weight itself."""
    codes = quantize(weight if quantized is None else quantized, spec)
    error = dequantize(codes, spec).astype(np.float64) - weight
    if mean.ndim > 1:
        return np.asarray(bias - (mean * error).reshape(len(error), -1).sum(axis=1), np.float32)
    return np.asarray(bias - mean @ error, np.float32)


def corrected_mean(
    node: ir.Node, sites: Mapping[str, Site], statistics: Statistics
) -> Double | None:
    """E[x] of a linear, [K], that has a bias of its own to correct with it; else None."""
    if not is_linear(node) or len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    bias = node.inputs[2]
    if constant(bias) is None or len(bias.uses()) != 1:
        return None
    return input_mean(node, sites, statistics)


def pixel_mean(conv: ir.Node, statistics: Statistics) -> Double | None:
    """E[x] of a convolution's input, [C], where it has a bias of its own to correct with it; else
    None. What is padded counts as the rest: its part is small."""
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    weight, read = constant(conv.inputs[1]), conv.inputs[0]
    if constant(bias) is None or bias is None or len(bias.uses()) != 1:
        return None
    stats = None if read is None else statistics.channels.get(str(read.name))
    if stats is None or weight is None:
        return None
    channels = weight.shape[1] * conv.attributes.get_int("group", 1)
    return stats.mean if stats.mean.size == channels else None


def input_mean(linear: ir.Node, sites: Mapping[str, Site], statistics: Statistics) -> Double | None:
    """E[x] of a linear's input, [K], or None where it was not measured."""
    return _of_input(linear, sites, statistics, lambda stats: stats.mean)


def input_power(
    linear: ir.Node, sites: Mapping[str, Site], statistics: Statistics, *, centred: bool
) -> Double | None:
    """E[x²] of a linear's input, less E[x]² if ``centred``, [K]; None as above."""
    if centred:
        return _of_input(linear, sites, statistics, lambda stats: stats.variance)
    return _of_input(linear, sites, statistics, lambda stats: stats.second_moment)


def _of_input(
    linear: ir.Node,
    sites: Mapping[str, Site],
    statistics: Statistics,
    value_of: Callable[[ChannelStatistics], Double],
) -> Double | None:
    """A value per channel of a linear's input, in the order of its rows."""
    read, name = linear.inputs[0], name_of(linear)
    if read is None:
        return None
    for site in sites.values():
        stats = statistics.channels.get(site.tensor)
        if site.is_parameter or name not in site.consumers or stats is None:
            continue
        start = start_of(read, site.tensor)
        value = value_of(stats)
        if start is None or value.size < 2:
            return None
        rows = rows_of(start, read, trim(value.astype(np.float32).reshape(stats.shape)))
        return None if rows is None else rows.astype(np.float64)
    return None


def start_of(value: ir.Value, tensor: str) -> ir.Value | None:
    """The tensor of that name that ``value`` is a layout of."""
    current: ir.Value | None = value
    while current is not None and current.name != tensor:
        node = current.producer()
        current = None if node is None else node.inputs[0]
    return current
