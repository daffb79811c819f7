"""Biases that take out the mean error which is measured where an op runs in integers.

Bias correction from the weight's error alone (``correction.py``) knows nothing of what the codes in
front have lost: values that are clipped, constants that are rounded, noise that a curved activation
function turns into a shift. Between convolutions one of these comes behind the other, and a shift
is alike in all pixels. So the network is run on a few images as its file computes it, op by op: the
mean of what an op makes is compared with the float model's, and what its bias takes out, no later
op reads. Source of the idea: Nagel et al., "Data-Free Quantization Through Weight Equalization and
Bias Correction" (arXiv 1906.04721), appendix D.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import is_convolution
from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.blocks.spans import spans_of
from ptq_onnx.blocks.walking import is_linear, name_of
from ptq_onnx.calibration.tapped_runs import add_outputs, taken_in_order
from ptq_onnx.engine.node_sessions import NodeKernels
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.progress import Advance
from ptq_onnx.quantizers.span_runs import Stream, quantized_around, run_span
from ptq_onnx.quantizers.stream_weights import Some, own_bias

Array = NDArray[np.float32]
Double = NDArray[np.float64]
IMAGES = 32
"""Whose tensors are held at once; more change the means little."""


def measured_biases(
    model: ir.Model,
    specs: Mapping[str, TensorSpec],
    batches: Iterable[Any],
    original: ir.Model,
    threads: int,
    advance: Advance,
) -> dict[str, Array]:
    """New biases [N], by name, of the linears and convolutions of ``model`` with a quantized weight
    and a bias of their own, one behind the other. ``original`` has the means that are to be kept:
    the same graph, with biases and weights as they were."""
    images, copy = Some(batches, IMAGES), model.clone()
    kernels = NodeKernels(copy, specs, threads)
    wanted = float_means(original, [n for n in copy.graph if _corrects(n, specs)], images, threads)
    stream: Stream = {str(copy.graph.inputs[0].name): list(images)}
    found: dict[str, Array] = {}

    def active(node: ir.Node) -> frozenset[str]:
        around, made = quantized_around(node, specs, kernels), str(node.outputs[0].name)
        bias = own_bias(node) if made in wanted else None
        if bias is None:
            return around
        names = kernels.inputs(name_of(node))
        values = (dict(zip(names, v, strict=True)) for v in zip(*(stream[n] for n in names)))
        outputs = (kernels.run(name_of(node), around - {made}, v)[0] for v in values)
        got = np.mean([mean_of(batch, node) for batch in outputs], axis=0)
        new = np.asarray(constant(bias) + wanted[made] - got, np.float32)
        bias.const_value, found[str(bias.name)] = ir.tensor(new, name=bias.name), new
        return around

    for span in spans_of(copy.graph, Blocks({}, 0)):
        run_span(span, kernels, stream, active)
    advance(images.count)
    return found


def float_means(
    model: ir.Model, nodes: Sequence[ir.Node], batches: Iterable[Any], threads: int
) -> dict[str, Double]:
    """The mean of each channel of what the nodes make, [N], by name, in the float model."""
    made = {str(node.outputs[0].name): node for node in nodes}
    standard = graphs.to_standard(model.clone())
    wanted = add_outputs(standard, made)

    def take(_: Array, values: dict[str, Any]) -> list[Double]:
        return [mean_of(values[name], made[name]) for name in wanted]

    taken = [means for _, means in taken_in_order(standard, wanted, batches, take, threads=threads)]
    return {name: np.mean(means, axis=0) for name, *means in zip(wanted, *taken, strict=True)}


def mean_of(made: Array, node: ir.Node) -> Double:
    """The mean of each channel, [N], of what a linear or a convolution makes."""
    axis = 1 if is_convolution(node) else made.ndim - 1
    others = tuple(i for i in range(made.ndim) if i != axis)
    return np.asarray(made.mean(axis=others, dtype=np.float64))


def _corrects(node: ir.Node, specs: Mapping[str, TensorSpec]) -> bool:
    if not is_convolution(node) or own_bias(node) is None:
        return False
    weight = node.inputs[1]
    return weight is not None and weight.name in specs
