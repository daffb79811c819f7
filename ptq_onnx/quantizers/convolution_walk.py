"""Weights and biases of convolutions, one behind the other, on what they read in integers.

Bias correction from the weight's error alone (``correction.py``) knows nothing of what the codes in
front have lost: values that are clipped, constants that are rounded, noise that a curved activation
function turns into a shift. Between convolutions one of these comes behind the other, and a shift
is alike in all pixels. So the network is run on a few images as its file computes it, op by op: a
convolution's weight is rounded for what it reads there, the mean of what it makes is compared with
the float model's, and what its bias takes out, no later op reads. Source of the idea: Nagel et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv 1906.04721),
appendix D.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import is_convolution
from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.blocks.spans import spans_of
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.calibration.tapped_runs import add_outputs, taken_in_order
from ptq_onnx.config import stages
from ptq_onnx.engine.node_sessions import NodeKernels
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.fake_quantize import fake_quantize
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.progress import untold
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.convolution_weights import rounded_weight
from ptq_onnx.quantizers.span_runs import Stream, quantized_around, run_span
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
    by name. ``model``: the plan's graph, with constants that were changed before; the means that
    are to be kept are those of the plan's own."""
    images, copy, threads = Some(batches, IMAGES), model.clone(), plan.config.threads
    advance = (plan.progress or untold)(stages.SHIFTS)
    ours = [n for n in copy.graph if _is_ours(n, specs)]
    wanted = float_means(plan.model, ours, images, threads)
    stream = as_inputs(copy.graph, images)
    walk = _Walk(copy, specs, NodeKernels(copy, specs, threads), stream, wanted)
    for span in spans_of(copy.graph, Blocks({}, 0)):
        run_span(span, walk.kernels, stream, walk.active)
    advance(images.count)
    return walk.found


@dataclass
class _Walk:
    """A walk through a model, whose constants are changed."""

    model: ir.Model
    specs: Mapping[str, TensorSpec]
    kernels: NodeKernels
    stream: Stream
    wanted: Mapping[str, Double]
    found: dict[str, Array] = field(default_factory=dict)

    def active(self, node: ir.Node) -> frozenset[str]:
        """The tensors that the node quantizes, once it has its new constants."""
        around = quantized_around(node, self.specs, self.kernels)
        if node.outputs[0].name in self.wanted:
            self.round(node, around)
            self.shift(node, around)
        return around

    def round(self, conv: ir.Node, around: frozenset[str]) -> None:
        """Give the convolution its rounded weight, where nothing else reads that."""
        read, weight = conv.inputs[0], conv.inputs[1]
        value = constant(weight)
        if read is None or weight is None or value is None or len(weight.uses()) != 1:
            return
        name, spec = str(read.name), None
        if name in around:
            carried = self.kernels.carried.get(name)
            spec = self.specs.get(name) if carried is None else carried[1]
        batches = self.stream[name]
        given = batches if spec is None else [fake_quantize(batch, spec) for batch in batches]
        exact = np.asarray(value, np.float32)
        new = rounded_weight(conv, exact, self.specs[str(weight.name)], given)
        if new is not None:
            self.replace(weight, new)

    def shift(self, conv: ir.Node, around: frozenset[str]) -> None:
        """Give the convolution a bias that keeps the mean of what it makes."""
        bias, name, made = own_bias(conv), name_of(conv), str(conv.outputs[0].name)
        assert bias is not None
        names = self.kernels.inputs(name)
        rows = zip(*(self.stream[n] for n in names), strict=True)
        runs = (dict(zip(names, row, strict=True)) for row in rows)
        means = [mean_of(self.kernels.run(name, around - {made}, run)[0]) for run in runs]
        shift = self.wanted[made] - np.mean(means, axis=0)
        self.replace(bias, np.asarray(constant(bias) + shift, np.float32))

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


def float_means(
    model: ir.Model, convolutions: Sequence[ir.Node], batches: Iterable[Any], threads: int
) -> dict[str, Double]:
    """The mean of each channel of what they make, [N], by its name, in the float model."""
    standard = graphs.to_standard(model.clone())
    names = add_outputs(standard, [str(node.outputs[0].name) for node in convolutions])

    def take(_: Array, values: dict[str, Any]) -> list[Double]:
        return [mean_of(values[name]) for name in names]

    taken = [means for _, means in taken_in_order(standard, names, batches, take, threads=threads)]
    return {name: np.mean(rows, axis=0) for name, *rows in zip(names, *taken, strict=True)}


def mean_of(made: Array) -> Double:
    """The mean of each channel, [N], of what a convolution makes, [B, N, H, W]."""
    return np.asarray(made.mean(axis=(0, 2, 3), dtype=np.float64))


def _is_ours(node: ir.Node, specs: Mapping[str, TensorSpec]) -> bool:
    if not is_convolution(node) or node.outputs[0].shape is None or own_bias(node) is None:
        return False
    weight = node.inputs[1]
    return weight is not None and weight.name in specs and len(node.outputs[0].shape) == 4
