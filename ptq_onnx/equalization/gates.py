"""Factors per channel of what a convolution gives to a gated activation: HardSwish and Silu.

Both are u · gate(u). With u / f out of the convolution, gate(f · (u / f)) and the product u / f · gate
are functions of the same u, and the product comes out divided by f: the rows of the convolutions
that read it take f in, through sums with constants, pools and factors per channel on the way. It
costs one Mul in front of the gate, on codes, in which 1 … 255 steps hold f exactly.
Source of the idea: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction" (arXiv 1906.04721), section 4.1, whose activations need no gate.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import rows_in_weight
from ptq_onnx.blocks.regions import Regions, only_clips
from ptq_onnx.blocks.walking import consumers, is_constant
from ptq_onnx.equalization.factor_search import (
    Choice,
    Product,
    choose_factor,
    normalized,
    positive,
)
from ptq_onnx.equalization.writer import Writer
from ptq_onnx.graph.formula import constant, new_constant

Double = NDArray[np.float64]
STEPS = 255
PASSING = frozenset(("GlobalAveragePool", "AveragePool", "MaxPool"))


@dataclass
class Gated:
    """One u · gate(u) on codes: the convolution, the first op of the gate, what carries the
    factor on, and who takes it in."""

    convolution: ir.Node
    value: ir.Value
    gate: ir.Node
    product: ir.Node
    least: float
    """Below it the product is (all but) zero."""
    slope: float = 1.0
    """How much of a change of u the product shows, where the gate is open."""
    carriers: list[ir.Value] = field(default_factory=list)
    sums: list[ir.Node] = field(default_factory=list)
    readers: list[ir.Node] = field(default_factory=list)

    def apply(self, graph: ir.Graph, factor: Double) -> ir.Value:
        """Divide by the factor [C] and take it in behind; returns what the gate reads now."""
        shape = (-1, 1, 1)
        conv = self.convolution
        weight, bias = _array(conv.inputs[1]), None
        if len(conv.inputs) > 2 and conv.inputs[2] is not None:
            bias = _array(conv.inputs[2])
        _replace(graph, conv, 1, weight / factor.reshape(-1, 1, 1, 1))
        if bias is not None:
            _replace(graph, conv, 2, bias / factor)
        write = Writer(graph, self.gate)
        number = new_constant(graph, f"{self.value.name}_factor", _single(factor.reshape(shape)))
        sizes = [] if self.value.shape is None else list(self.value.shape)
        made = write.node("Mul", [self.value, number], sizes, self.value, "whole")
        self.gate.replace_input_with(0, made)
        for node in self.sums:
            index = 1 if is_constant(node.inputs[1]) else 0
            shift = np.broadcast_to(_array(node.inputs[index]), (len(factor), 1, 1))
            _replace(graph, node, index, shift / factor.reshape(shape))
        for node in self.readers:
            rows = rows_in_weight(node, factor.astype(np.float32)).astype(np.float64)
            _replace(graph, node, 1, _array(node.inputs[1]) * rows)
        return made


def gated(regions: Regions) -> list[Gated]:
    """Every gate in the regions whose factor can be taken in."""
    found: list[Gated] = []
    for conv in regions.convolutions:
        value = conv.outputs[0]
        readers = [node for node, _ in consumers(value)]
        if len(readers) != 2 or value.is_graph_output() or not regions.ops.issuperset(readers):
            continue
        product = next((n for n in readers if n.op_type == "Mul"), None)
        gate = next((n for n in readers if n.op_type in ("Add", "Sigmoid")), None)
        if product is None or gate is None or not _closes(gate, product):
            continue
        shift = constant(gate.inputs[1]) if gate.op_type == "Add" else None
        least = -12.0 if shift is None else -float(shift.ravel()[0])
        slope = 1.0 if shift is None else 2 * float(shift.ravel()[0])
        one = Gated(conv, value, gate, product, least, slope)
        if _follow(one, product.outputs[0], regions) and one.readers:
            found.append(one)
    order = {v: i for i, v in enumerate(regions.codes)}
    return sorted(found, key=lambda one: order.get(one.value, 0))


def _closes(gate: ir.Node, product: ir.Node) -> bool:
    """True where the product's other factor is the gate, clipped where it is a sum."""
    made = gate.outputs[0]
    if gate.op_type == "Add":
        behind = [n for n, _ in consumers(made)]
        if len(behind) != 1 or not only_clips(behind[0]) or not is_constant(gate.inputs[1]):
            return False
        made = behind[0].outputs[0]
    return made in product.inputs and len(list(consumers(made))) == 1


def _follow(one: Gated, value: ir.Value, regions: Regions) -> bool:
    """Collect what carries the factor on; False where something cannot take it in."""
    one.carriers.append(value)
    if value.is_graph_output():
        return False
    for node, index in consumers(value):
        if node.op_type == "Conv" and index == 0 and node in regions.convolutions:
            if all(map(is_constant, node.inputs[1:])) and node not in one.readers:
                one.readers.append(node)
                continue
            return False
        if node not in regions.ops:
            return False
        other = next((v for i, v in enumerate(node.inputs) if i != index), None)
        if node.op_type == "Add" and is_constant(other):
            one.sums.append(node)
        elif node.op_type == "Mul" and other is not None and not is_constant(other):
            dims = [] if other.shape is None else list(other.shape)
            if len(dims) != 4 or dims[2:] != [1, 1] or other in one.carriers:
                return False
        elif node.op_type not in PASSING:
            return False
        if not _follow(one, node.outputs[0], regions):
            return False
    return True


def choose_gate(
    half: Double, made: list[Double], variance: Double, products: list[Product], levels: int
) -> Choice:
    """The factor for half ranges [C] of what the gate reads and of what is made of it: of the least
    expected noise where convolutions that mix channels read it; where each reads its own, all
    ranges alike."""
    if products:
        return choose_factor(half, variance, products, levels, [(one, 1.0) for one in made])
    half = np.max([half, *made], axis=0)
    ones, factor = np.ones(len(half)), normalized(positive(half))
    noise = [float(np.square((half / f).max() * f).sum()) for f in (ones, factor)]
    return Choice(factor, noise[1], noise[0], exponent=1.0)


def in_steps(factor: Double) -> Double:
    """The factor in whole parts of 1/255 of the largest, none of them 0."""
    largest = float(factor.max())
    return np.asarray(np.clip(np.round(STEPS * factor / largest), 1, STEPS) * (largest / STEPS))


def hard_swish_range(low: Double, high: Double, shift: float) -> tuple[Double, Double]:
    """The range of u · clip(u + c, 0, 2c), c = ``shift``, for u from ``low`` to ``high`` [C]."""
    ends = [u * np.clip(u + shift, 0, 2 * shift) for u in (low, high)]
    lowest = np.where((low < -shift / 2) & (high > -shift / 2), -(shift**2) / 4, np.inf)
    return np.minimum(np.minimum(*ends), lowest), np.maximum(*ends)


def _array(value: ir.Value | None) -> Double:
    array = constant(value)
    assert array is not None
    return np.asarray(array, np.float64)


def _single(array: Double) -> NDArray[np.float32]:
    return np.asarray(array, np.float32)


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: Double) -> None:
    old = node.inputs[index]
    assert old is not None
    stem = str(old.name).removesuffix("_equal")
    node.replace_input_with(index, new_constant(graph, f"{stem}_equal", _single(array)))
