"""New weights for the linears of a model, rounded by ``rounding.py``.

A rounded weight is scale·code, so that quantizing it to the nearest gives that code again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.calibration.methods import Statistics
from ptq_onnx.calibration.moments import collect_moments, groups
from ptq_onnx.config import stages
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.fake_quantize import dequantize
from ptq_onnx.numerics.rounding import adaround, gptq, shrunk
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.progress import untold
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.correction import corrected_mean
from ptq_onnx.quantizers.importance import importance_of_inputs

Array = NDArray[np.float32]
Double = NDArray[np.float64]
METHODS: dict[str, Callable[..., NDArray[np.int8]]] = {"gptq": gptq, "adaround": adaround}
WIDEST = 8192
"""Inputs of a linear up to which second moments are taken (half a GB in float64)."""


@dataclass(frozen=True)
class _Linear:
    """A linear to round: its weight [K, N], that weight's name, and the tensor it reads."""

    node: ir.Node
    read: str
    name: str
    weight: Array


@dataclass(frozen=True)
class Rounded:
    """Weights [K, N] and the mean [K] of what they are multiplied with, by the weight's name;
    rows count as their positions do. ``notes``: on what was left out."""

    weights: dict[str, Array] = field(default_factory=dict)
    means: dict[str, Double] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def rounded_weights(
    plan: Plan, specs: Mapping[str, TensorSpec], statistics: Statistics, batches: Iterable[Any]
) -> Rounded:
    """Weights rounded as the plan's config says.

    Where the bias takes the mean error out, only the covariance of the input counts. Runs the
    batches again, once for each group of ``collect_moments``, but for weights in
    ``plan.rounded``, to which it adds.
    """
    config = plan.config
    if config.rounding == "nearest":
        return Rounded()
    linears, notes = _linears(plan.model, specs)
    bits = {linear.name: specs[linear.name].rule.bits for linear in linears}
    done = plan.rounded  # an earlier dispatch of the plan may have rounded some: the same numbers
    linears = [linear for linear in linears if (linear.name, bits[linear.name]) not in done]
    if linears:
        notes += _round(plan, linears, specs, statistics, batches)
    found = {name: done[name, b] for name, b in bits.items() if (name, b) in done}
    weights = {name: weight for name, (weight, _) in found.items()}
    return Rounded(weights, {name: mean for name, (_, mean) in found.items()}, notes)


def _round(
    plan: Plan,
    linears: list[_Linear],
    specs: Mapping[str, TensorSpec],
    statistics: Statistics,
    batches: Iterable[Any],
) -> list[str]:
    """Round the weights, into ``plan.rounded``; returns what there is to say."""
    config, method = plan.config, METHODS[plan.config.rounding]
    report = plan.progress or untold
    images = max((s.images for s in statistics.channels.values()), default=config.images)
    importance = importance_of_inputs(plan.model, batches, images, report(stages.POSITIONS))
    channels = {linear.read: len(linear.weight) for linear in linears}
    runs = len(groups(channels))
    advance = report(stages.ROUNDING, runs=runs)
    for group in collect_moments(
        plan.model,
        channels,
        batches,
        counts=importance.positions,
        threads=config.threads,
        progress=lambda: advance,
    ):
        for linear in linears:
            if linear.read not in group:
                continue
            moments = group[linear.read]
            mean = corrected_mean(linear.node, plan.sites, statistics)
            centred = config.bias_correction and mean is not None
            power = moments.covariance if centred else moments.second_moment
            spec = specs[linear.name]
            shape = linear.weight.shape
            if spec.rule.grain.block_size:
                numbers = spec.numbers(shape)
                scale, zero = numbers.scale, numbers.zero_point
            else:
                scale, zero = np.broadcast_to(spec.scale, shape[1:]), None
            width = spec.rule.bits
            codes = method(linear.weight, scale, shrunk(power, moments.rows), width, zero)
            whole = codes.astype(np.int32) + (0 if zero is None else zero)
            plan.rounded[linear.name, width] = dequantize(whole, spec), moments.mean
    return [] if importance.note is None else [importance.note]


def _linears(model: ir.Model, specs: Mapping[str, TensorSpec]) -> tuple[list[_Linear], list[str]]:
    """Linears whose weight nothing else reads, and notes on those that are too wide."""
    found, notes = [], []
    for node in model.graph:
        if not is_linear(node):
            continue
        read, weight = node.inputs[0], node.inputs[1]
        value = constant(weight)
        spec = None if weight is None else specs.get(str(weight.name))
        if read is None or weight is None or value is None or spec is None:
            continue
        shared = len(weight.uses()) != 1 or weight.is_graph_output()
        if shared or spec.factor is not None or weight.name not in model.graph.initializers:
            continue
        if len(value) > WIDEST:
            notes.append(
                f"{weight.name}: rounded to the nearest; second moments of its {len(value)}"
                f" inputs are too many (at most {WIDEST})."
            )
            continue
        exact = np.asarray(value, np.float32)
        found.append(_Linear(node, str(read.name), str(weight.name), exact))
    return found, notes
