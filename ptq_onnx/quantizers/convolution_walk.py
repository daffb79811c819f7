"""Weights and biases of convolutions, one behind the other, on what they read in integers.

Bias correction from the weight's error alone (``correction.py``) knows nothing of what the codes in
front have lost: values that are clipped, constants that are rounded, noise that a curved activation
function turns into a shift. Between convolutions one of these comes behind the other, and a shift
is alike in all pixels. So the network is run on a few images as its file computes it, op by op,
beside the float one: a convolution's weight is fitted to what it reads there and rounded, the mean
of what it makes is compared with the float model's, and what its bias takes out, no later op
reads. Source of the idea: Nagel et al., "Data-Free Quantization Through Weight Equalization and
Bias Correction" (arXiv 1906.04721), appendix D.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import is_convolution
from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.blocks.spans import spans_of
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.config import stages
from ptq_onnx.engine.node_sessions import NodeKernels
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.fake_quantize import fake_quantize
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.progress import untold
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.convolution_weights import (
    may_round,
    moments_of,
    refitted,
    rounded_weight,
)
from ptq_onnx.quantizers.span_runs import Stream, quantized_around, run_node, run_span
from ptq_onnx.quantizers.stream_weights import Some, own_bias
from ptq_onnx.runtime.packed import unpack

Array = NDArray[np.float32]
Double = NDArray[np.float64]
IMAGES = 32
"""Whose tensors are held at once; more change the means little."""


def corrected_convolutions(
    plan: Plan, model: ir.Model, specs: Mapping[str, TensorSpec], batches: Iterable[Any]
) -> dict[str, Array]:
    """New weights and biases [N] of convolutions with a quantized weight and a bias of their own,
    by name. ``model``: the plan's graph, with constants that were changed before; what is to be
    kept is what the plan's own makes."""
    images, copy, threads = Some(batches, IMAGES), model.clone(), plan.config.threads
    advance = (plan.progress or untold)(stages.SHIFTS)
    ours = [n for n in copy.graph if _is_ours(n, specs)]
    stream = as_inputs(copy.graph, images)
    floats = NodeKernels(plan.model, {}, threads)
    kernels = NodeKernels(copy, specs, threads)
    walk = _Walk(specs, kernels, stream, floats, dict(stream), {name_of(n) for n in ours})
    for span in spans_of(copy.graph, Blocks({}, 0)):
        if walk.waiting:
            run_span(span, kernels, stream, walk.active, walk.forget)
    advance(images.count)
    return walk.found


@dataclass
class _Walk:
    """A walk through a model, whose constants are changed, beside the float one."""

    specs: Mapping[str, TensorSpec]
    kernels: NodeKernels
    stream: Stream
    floats: NodeKernels
    exact: Stream
    """What the float model makes."""
    waiting: set[str]
    """Convolutions to come, by name."""
    found: dict[str, Array] = field(default_factory=dict)

    def active(self, node: ir.Node) -> frozenset[str]:
        """The tensors that the node quantizes, once it has its new constants."""
        around, name = quantized_around(node, self.specs, self.kernels), name_of(node)
        made = run_node(node, self.floats, self.exact, frozenset())
        for index, value in enumerate(v for v in node.outputs if v.name):
            self.exact[str(value.name)] = [batch[index] for batch in made]
        if name in self.waiting:
            self.waiting.remove(name)
            self.round(node, around)
            self.shift(node, around)
        return around

    def forget(self, tensor: str) -> None:
        """Let go of what is not read any more."""
        self.exact.pop(tensor, None)

    def round(self, conv: ir.Node, around: frozenset[str]) -> None:
        """Give the convolution a weight that fits what it reads in integers, in steps, where
        nothing else reads it."""
        read, weight = conv.inputs[0], conv.inputs[1]
        value = constant(weight)
        if read is None or weight is None or value is None or len(weight.uses()) != 1:
            return
        if not may_round(conv):
            return
        name, spec = str(read.name), None
        if name in around:
            carried = self.kernels.carried.get(name)
            spec = self.specs.get(name) if carried is None else carried[1]
        batches = self.stream[name]
        given = batches if spec is None else [fake_quantize(batch, spec) for batch in batches]
        new = np.asarray(value, np.float32)
        moments, rows = moments_of(conv, new.shape, given)
        new = refitted(conv, new, self.exact[name], given, moments)
        self.replace(weight, rounded_weight(new, self.specs[str(weight.name)], moments, rows))

    def shift(self, conv: ir.Node, around: frozenset[str]) -> None:
        """Give the convolution a bias that keeps the mean of what it makes."""
        bias, made = own_bias(conv), str(conv.outputs[0].name)
        assert bias is not None
        runs = run_node(conv, self.kernels, self.stream, around - {made})
        means = [mean_of(run[0]) for run in runs]
        wanted = [mean_of(batch) for batch in self.exact[made]]
        change = np.mean(wanted, axis=0) - np.mean(means, axis=0)
        self.replace(bias, np.asarray(constant(bias) + change, np.float32))

    def replace(self, value: ir.Value, array: Array) -> None:
        """Give a constant its new numbers."""
        value.const_value = ir.tensor(array, name=value.name)
        self.found[str(value.name)] = array


def as_inputs(graph: ir.Graph, batches: Iterable[Array]) -> Stream:
    """Batches by the graph's inputs, in their types; packed ones (``runtime/packed.py``) apart."""
    inputs = [v for v in graph.inputs if not v.is_initializer()]
    rows = [unpack(batch) or [batch] for batch in batches]
    types = [None if v.dtype is None else v.dtype.numpy() for v in inputs]
    return {
        str(v.name): [np.asarray(row[i], types[i]) for row in rows] for i, v in enumerate(inputs)
    }


def mean_of(made: Array) -> Double:
    """The mean of each channel, [N], of what a convolution makes, [B, N, H, W]."""
    return np.asarray(made.mean(axis=(0, 2, 3), dtype=np.float64))


def _is_ours(node: ir.Node, specs: Mapping[str, TensorSpec]) -> bool:
    if not is_convolution(node) or node.outputs[0].shape is None or own_bias(node) is None:
        return False
    weight = node.inputs[1]
    return weight is not None and weight.name in specs and len(node.outputs[0].shape) == 4
