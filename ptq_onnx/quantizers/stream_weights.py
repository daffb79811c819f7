"""Weights rounded on the quantized model: each linear on what it really reads.

The model is run node by node on a few images, in ONNX Runtime, as the file will be; every linear's
weight is rounded when the walk comes to it, so that all before it are rounded already. Its bias
then makes the mean of its output that of the float model on the same images: E[x] W - E[x̂] Ŵ.
(More than the mean is not taken from the float model: weights fitted to it from noisy inputs shrink
the signal, block after block.) Memory is that of the tensors of those images that are still to be
read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.role_map import Blocks
from ptq_onnx.blocks.spans import Span, spans_of
from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.calibration.row_samples import row_means
from ptq_onnx.calibration.tapped_runs import copies_in
from ptq_onnx.config import stages
from ptq_onnx.config.names import OLDER
from ptq_onnx.engine.node_sessions import NodeKernels
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.codes.multiples import LARGEST, NARROW, MultipleCodes
from ptq_onnx.numerics.fake_quantize import dequantize, fake_quantize
from ptq_onnx.numerics.multiples import WIDEST, improved_in_blocks, rounded_in_blocks
from ptq_onnx.numerics.rounding import gptq, gptq_ranged
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.numerics.weights import SEARCHED_BELOW, weight_scale
from ptq_onnx.progress import Advance, untold
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.importance import Importance, importance_of_inputs, read_by_linears
from ptq_onnx.quantizers.learning import Learning, Trained
from ptq_onnx.quantizers.output_costs import OutputCosts, find_output_costs
from ptq_onnx.quantizers.reconstruction import Reconstruction, with_steps
from ptq_onnx.quantizers.span_runs import Stream, quantized_around, run_span

Array = NDArray[np.float32]
Double = NDArray[np.float64]

IMAGES = 128
"""Images that are held, at most."""


@dataclass
class _Walk:
    """The state of one walk."""

    model: ir.Model
    """A copy whose weights become the rounded ones."""
    specs: dict[str, TensorSpec]
    kernels: NodeKernels
    tensors: Stream = field(default_factory=dict)
    """Values that are still to be read, in batches."""
    constants: dict[str, Array] = field(default_factory=dict)
    means: Mapping[str, Double] = field(default_factory=dict)
    """E[x] of what linears read of the float model, by tensor, rows counting as below."""
    moments: dict[str, tuple[Double, Double]] = field(default_factory=dict)
    """E[x] and E[xᵀx] of inputs that other linears read too."""
    importance: Importance = field(default_factory=Importance)
    """Of the positions of what linears read."""
    threads: int = 0
    largest: int = LARGEST
    """Of a weight's codes."""
    costs: Mapping[str, Double] = field(default_factory=dict)
    """Of what linears make, by tensor, where weights are rounded by them."""

    def run(
        self, spans: Sequence[Span], advance: Callable[[float], None], train: Reconstruction | None
    ) -> None:
        """Span by span, each trained where that is wanted; ``advance`` is told the part done."""
        read = Counter(name for span in spans for name in span.inputs)
        for place, span in enumerate(spans):

            def tell(part: float, place: int = place) -> None:
                advance((place + part) / len(spans))

            self.through(span, tell if train is None else _nothing)
            if train is not None:
                feeds = {name: self.tensors[name] for name in span.inputs}
                learning = train(span, feeds, self.specs, tell)
                if learning is not None:
                    self.take(learning)
                    self.through(span, _nothing, rounding=False)
            read.subtract(span.inputs)
            for name in span.inputs:
                if not read[name]:
                    del self.tensors[name]
                    self.forget(name)
            if train is not None:
                train.forget(name for name in span.inputs if not read[name])
            tell(1.0)

    def through(self, span: Span, advance: Callable[[float], None], rounding: bool = True) -> None:
        """Node by node, from the span's inputs to its outputs, which are kept."""

        def active(node: ir.Node) -> frozenset[str]:
            if rounding and is_linear(node):
                self.round(node)
            return quantized_around(node, self.specs, self.kernels)

        run_span(span, self.kernels, self.tensors, active, self.forget, advance)

    def forget(self, name: str) -> None:
        """Drop what is known of a tensor that is not read any more."""
        self.moments.pop(name, None)

    def take(self, learning: Learning) -> None:
        """Let a block have what it has learned."""
        for name, array in learning.constants.items():
            self.replace(self.model.graph.initializers[name], array)
        self.specs |= with_steps(self.specs, learning.steps)
        self.kernels = NodeKernels(self.model, self.specs, self.threads)

    def round(self, node: ir.Node) -> None:
        """Give the linear its rounded weight, where it has one of its own."""
        read, weight = node.inputs[0], node.inputs[1]
        value = constant(weight)
        spec = None if weight is None else self.specs.get(str(weight.name))
        if read is None or weight is None or value is None or spec is None:
            return
        shared = len(weight.uses()) != 1 or weight.is_graph_output()
        if shared or spec.factor is not None or weight.name not in self.model.graph.initializers:
            return
        exact = np.asarray(value, np.float32)
        mean, moments = self.moments_of(read)
        bias = own_bias(node)
        if bias is not None:  # it takes the mean's part of the error
            moments = moments - np.outer(mean, mean)
        bits = spec.rule.bits
        if bits <= WIDEST and spec.axis is not None:
            found = rounded_in_blocks(exact, moments, bits, self.largest)
            costs = self.costs.get(str(node.outputs[0].name))
            if costs is not None:
                found = improved_in_blocks(exact, found, moments, costs, bits)
            codes, zeros = found.codes, np.zeros(len(found.step), np.int32)
            rule = replace(spec.rule, code=MultipleCodes(), symmetric=True)
            spec = replace(spec, rule=rule, scale=found.step, zero_point=zeros, order=found.order)
        elif bits < SEARCHED_BELOW and spec.axis is not None:
            scale, zero, codes = gptq_ranged(exact, moments, bits)
            # of codes with a sign
            spec = replace(spec, scale=scale, zero_point=zero + np.int32(spec.rule.limits[0]))
        else:
            scale = weight_scale(exact, spec.axis, bits, power=np.diag(moments).copy())
            scale = np.broadcast_to(scale, exact.shape[1:])
            codes = gptq(exact, scale, moments, bits)
            spec = replace(spec, scale=np.asarray(scale if spec.axis is not None else scale[0]))
        rounded = dequantize(codes.astype(np.int32) + spec.zero_point, spec)
        self.specs[str(weight.name)] = spec
        self.kernels.respecify(spec)
        self.replace(weight, rounded)
        if bias is not None:
            before = self.means.get(str(read.name), mean)
            old = np.asarray(constant(bias), np.float64)
            self.replace(bias, old + before @ exact - mean @ rounded.astype(np.float64))

    def replace(self, value: ir.Value, array: NDArray[Any]) -> None:
        """Give a constant its new numbers."""
        new = np.asarray(array, np.float32)
        value.const_value = ir.tensor(new, name=value.name)
        self.constants[str(value.name)] = new

    def moments_of(self, read: ir.Value) -> tuple[Double, Double]:
        """E[x] and E[xᵀx] of what a linear reads, quantized, [K] and [K, K]; rows count as their
        positions do."""
        name = str(read.name)
        if name in self.moments:
            return self.moments[name]
        spec = self.specs.get(name)
        carried = self.kernels.carried.get(name)
        spec = carried[1] if carried is not None else spec
        width = self.tensors[name][0].shape[-1]
        total, first, counted = np.zeros((width, width)), np.zeros(width), 0.0
        for batch in self.tensors[name]:
            x = fake_quantize(batch, spec) if spec is not None else batch
            counts = self.importance.rows(name, x.shape[:-1])
            x = x.reshape(-1, width)
            weighted = x * counts[:, None]
            total += x.T @ weighted
            first += weighted.sum(axis=0, dtype=np.float64)
            counted += float(counts.sum(dtype=np.float64))
        self.moments[name] = first / counted, total / counted
        return self.moments[name]


def _nothing(_: float) -> None:
    """Where training tells how far it is."""


def own_bias(linear: ir.Node) -> ir.Value | None:
    """A linear's bias where it is a constant that nothing else reads."""
    bias = linear.inputs[2] if len(linear.inputs) > 2 else None
    if bias is None or constant(bias) is None or len(bias.uses()) != 1:
        return None
    return bias


@dataclass(frozen=True)
class OnStream:
    """Changed weights, biases and more constants by name; the specs with their steps; the blocks
    that were trained, where that is asked for; and what there is to say."""

    constants: dict[str, Array]
    specs: dict[str, TensorSpec]
    trained: tuple[Trained, ...]
    notes: list[str]


def rounded_on_stream(
    plan: Plan, specs: Mapping[str, TensorSpec], batches: Iterable[Any]
) -> OnStream:
    """The weights of a plan's model, rounded on batches [B, C, H, W] that are run node by node."""
    images = Some(batches)
    model, threads = plan.model.clone(), plan.config.threads
    report = plan.progress or untold
    importance = importance_of_inputs(plan.model, images, images.count, report(stages.POSITIONS))
    read = read_by_linears(plan.model.graph)
    costs = OutputCosts()
    if plan.config.rounds_by_output:
        costs = find_output_costs(plan.model, images, report(stages.COSTS))
    walk = _Walk(
        model,
        dict(specs),
        NodeKernels(model, specs, threads),
        {str(model.graph.inputs[0].name): images.batches},
        means=row_means(plan.model, read, images, importance.rows, threads=threads),
        importance=importance,
        threads=threads,
        largest=NARROW if plan.config.cpu == OLDER else LARGEST,
        costs=costs.matrices,
    )
    trains = plan.config.reconstruct
    stage = stages.RECONSTRUCTING if trains else stages.ROUNDING
    advance = report(stage)
    train = Reconstruction(plan, images.batches) if trains else None
    spans = spans_of(model.graph, plan.blocks if trains else Blocks({}, 0))
    walk.run(spans, _Parts(advance, images.count), train)
    notes = [note for note in (importance.note, costs.note) if note is not None]
    if train is not None:
        notes += train.told()
    trained = () if train is None else tuple(train.trained)
    return OnStream(walk.constants, walk.specs, trained, notes)


class _Parts:
    """Tells a bar that counts images which part of a walk is done."""

    def __init__(self, advance: Advance, images: int) -> None:
        self._advance, self._images, self._told = advance, images, 0

    def __call__(self, part: float) -> None:
        new = int(self._images * part + 1e-6) - self._told
        if new > 0:
            self._told += new
            self._advance(new)


class Some:
    """The first ``limit`` images of batches, as batches."""

    def __init__(self, batches: Iterable[Any], limit: int = IMAGES) -> None:
        self.batches: list[Any] = []
        self.copies, self.count = copies_in(batches), 0
        for batch in batches:
            self.batches.append(batch)
            self.count += len(batch) // self.copies
            if self.count >= limit:
                break

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)
