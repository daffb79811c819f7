"""Specs from ranges: one scale for a tensor, or a step for every channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.config.bits import BYTE
from ptq_onnx.config.names import OLDER
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.codes.code import Solved
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.fake_quantize import reach
from ptq_onnx.numerics.pair_sums import fitting_scale
from ptq_onnx.numerics.ptf import least_steps
from ptq_onnx.numerics.spec import Rule, Site, TensorSpec

Array = NDArray[np.float32]
LARGEST_BIAS = 2.0**30
"""Of int32 codes, with room for what is corrected."""


def tensor_spec(
    site: Site, rule: Rule, low: float, high: float, factor: Array | None = None
) -> TensorSpec:
    """One scale and zero point that cover [low, high] (of the tensor divided by ``factor``)."""
    lows, highs = np.array([low], np.float32), np.array([high], np.float32)
    found = rule.code.solve(lows, highs, rule.bits, rule.signed, rule.symmetric)
    return solved_spec(site, rule, found, factor)


def weight_spec(
    site: Site, rule: Rule, weight: Array, factor: Array | None, cpu: str
) -> TensorSpec:
    """Symmetric scales of a weight, divided by ``factor`` before; those of 8 bits for an older
    ``cpu`` as its kernels add up."""
    if factor is not None:
        weight = weight / factor
    axis = site.channel_axes[0] if rule.grain.per_channel else None
    scale = _of_zeros_too(rule.code.weight_scale(weight, axis, rule.bits), weight, axis)
    if cpu == OLDER and rule.bits == BYTE and rule.code == Uniform():
        scale = fitting_scale(weight, axis, scale)
    return TensorSpec(
        tensor=site.tensor,
        rule=rule,
        scale=np.asarray(scale, np.float32),
        zero_point=np.zeros(scale.shape, np.int32),
        axis=axis,
        factor=factor,
        clip=(float(weight.min(initial=0)), float(weight.max(initial=0))),
    )


def _of_zeros_too(scale: Array, weight: Array, axis: int | None) -> Array:
    """Scales in which a channel of zeros has the largest of all: its codes are zero with any, and
    a small one makes of its bias a number that an accelerator's multipliers do not hold."""
    if axis is None or scale.ndim != 1 or len(scale) != weight.shape[axis]:
        return scale
    others = tuple(a for a in range(weight.ndim) if a != axis % weight.ndim)
    return np.where(np.abs(weight).max(axis=others, initial=0) > 0, scale, scale.max())


def solved_spec(site: Site, rule: Rule, found: Solved, factor: Array | None = None) -> TensorSpec:
    """The spec of numbers that are arrays of one."""
    spec = TensorSpec(
        tensor=site.tensor,
        rule=rule,
        scale=np.asarray(found.scale[0]),
        zero_point=np.asarray(found.zero_point[0]),
        factor=factor,
        details=found.details,
    )
    return replace(spec, clip=reach(spec.with_factor(None)))


def clip_range(scale: float, zero: int, rule: Rule) -> tuple[float, float]:
    """The values of the smallest and the largest code, without any factor."""
    smallest, largest = rule.limits
    return (smallest - zero) * scale, (largest - zero) * scale


def channel_spec(
    site: Site, rule: Rule, low: Array, high: Array, shape: tuple[int, ...]
) -> TensorSpec:
    """A step of its own for every channel [C]: the largest as scale, ratios as factor."""
    low64, high64 = low.astype(np.float64), high.astype(np.float64)
    zero, step = least_steps(low64, high64, rule.limits, rule.symmetric)
    scale = float(step.max())
    # A channel that is constantly zero must not get a ratio that underflows.
    ratio = np.maximum(step / scale, 2.0**-20).astype(np.float32)
    return TensorSpec(
        tensor=site.tensor,
        rule=rule,
        scale=np.array(scale, np.float32),
        zero_point=np.array(zero, np.int32),
        factor=trim(ratio.reshape(shape)),
        clip=clip_range(scale, zero, rule),
    )


def with_room_for_biases(graph: ir.Graph, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The weights of convolutions on codes whose steps are too small for their biases, with larger
    ones: those are int32 codes in steps of weight times input, and a channel whose weights are all
    (but) zero would lose its bias."""
    found: dict[str, TensorSpec] = {}
    for node in graph:
        if node.op_type != "Conv" or len(node.inputs) < 3 or None in node.inputs[:3]:
            continue
        read, weight, bias = (specs.get(str(v.name)) for v in node.inputs[:3] if v is not None)
        offset = constant(node.inputs[2])
        if read is None or weight is None or bias is not None or offset is None:
            continue
        if read.scale.ndim or weight.axis != 0 or weight.factor is not None:
            continue
        least = np.abs(np.asarray(offset, np.float64)) / (float(read.scale) * LARGEST_BIAS)
        if (least > weight.scale).any():
            scale = np.maximum(weight.scale, least).astype(np.float32)
            found[weight.tensor] = replace(weight, scale=scale)
    return found


def trim(factor: Array) -> Array:
    """Drop leading axes of size 1: the factor broadcasts from the right."""
    while factor.ndim > 1 and factor.shape[0] == 1:
        factor = factor[0]
    return factor
