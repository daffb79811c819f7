"""New weights for the linears of a model, rounded by ``rounding.py``.

A rounded weight is scale·code, so that quantizing it to the nearest gives that code again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
from ptq_onnx.progress import silent
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.correction import corrected_mean

Array = NDArray[np.float32]
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


def rounded_weights(
    plan: Plan, specs: Mapping[str, TensorSpec], statistics: Statistics, batches: Iterable[Any]
) -> tuple[dict[str, Array], list[str]]:
    """Weights [K, N] by name, rounded as the plan's config says, and notes on those left out.

    Where the bias takes the mean error out, only the covariance of the input counts. Runs the
    batches again, once for each group of ``collect_moments``, but for weights in
    ``plan.rounded``, to which it adds.
    """
    config = plan.config
    if config.rounding == "nearest":
        return {}, []
    method = METHODS[config.rounding]
    linears, notes = _linears(plan.model, specs)
    bits = {linear.name: specs[linear.name].rule.bits for linear in linears}
    done = plan.rounded  # an earlier dispatch of the plan may have rounded some: the same numbers
    found = {name: done[name, b] for name, b in bits.items() if (name, b) in done}
    linears = [linear for linear in linears if linear.name not in found]
    if not linears:
        return found, notes
    channels = {linear.read: len(linear.weight) for linear in linears}
    runs = len(groups(channels))
    advance = silent if plan.progress is None else plan.progress(stages.ROUNDING, runs=runs)
    for group in collect_moments(
        plan.model, channels, batches, threads=config.threads, progress=lambda: advance
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
            found[linear.name] = dequantize(whole, spec)
            done[linear.name, width] = found[linear.name]
    return found, notes


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
