"""Factors per channel of tensors on codes, which the convolutions behind take in.

What a convolution gives is divided in its weight, and Relu lets that pass. HardSwish is
u · gate(u). With u / f out of the convolution, gate(f · (u / f)) and the product u / f · gate
are functions of the same u, and the product comes out divided by f: the rows of the convolutions
that read it take f in, through sums with constants, pools and factors per channel on the way. It
costs one Mul in front of the gate, on codes, in which 1 … 255 steps hold f exactly.
Source of the idea: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction" (arXiv 1906.04721), section 4.1, whose activations need no gate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import rows_in_weight
from ptq_onnx.blocks.region_ops import result_of
from ptq_onnx.blocks.regions import Regions
from ptq_onnx.blocks.walking import consumers, is_constant, is_layout
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
REACH = 128 / 127 * (1 + 1e-6)
"""Codes of −c … c have 128 steps below zero and 127 above: c is one of them."""
PASSING = frozenset(("GlobalAveragePool", "AveragePool", "MaxPool"))


@dataclass
class Carried:
    """What a factor per channel of a tensor goes through, and who takes it in."""

    values: list[ir.Value] = field(default_factory=list)
    sums: list[ir.Node] = field(default_factory=list)
    readers: list[ir.Node] = field(default_factory=list)

    def take_in(self, graph: ir.Graph, factor: Double) -> None:
        """Let the readers take values that are divided by the factor [C]."""
        for node in self.sums:
            index = 1 if is_constant(node.inputs[1]) else 0
            shift = np.broadcast_to(_array(node.inputs[index]), (len(factor), 1, 1))
            _replace(graph, node, index, shift / factor.reshape(-1, 1, 1))
        for node in self.readers:
            rows = rows_in_weight(node, factor.astype(np.float32)).astype(np.float64)
            _replace(graph, node, 1, _array(node.inputs[1]) * rows)


@dataclass(frozen=True)
class Source:
    """A tensor on codes whose channels can be divided by factors."""

    value: ir.Value
    carried: Carried
    name: ClassVar[str]
    costs: ClassVar[bool] = False
    """It takes an op of floats for each element."""

    @property
    def made(self) -> list[ir.Value]:
        """The tensors that come out divided."""
        return list(dict.fromkeys((self.value, *self.carried.values)))

    def divide(self, graph: ir.Graph, factor: Double) -> dict[str, str]:
        """Divide the tensor by the factor [C]; what reads it is not changed yet. Returns which new
        tensors are those of old names, divided."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(Source):
    """A convolution, with or without Relu behind it."""

    convolution: ir.Node
    name: ClassVar[str] = "the convolutions behind"

    def divide(self, graph: ir.Graph, factor: Double) -> dict[str, str]:
        """In its weight and bias."""
        _divide_outputs(graph, self.convolution, factor)
        return {}


@dataclass(frozen=True)
class Gated(Source):
    """u · gate(u) on codes, u out of a convolution."""

    convolution: ir.Node
    gate: ir.Node
    least: float
    """Below it the product is (all but) zero."""
    slope: float
    """How much of a change of u the product shows, where the gate is open."""
    name: ClassVar[str] = "the gate and the convolutions behind"

    def divide(self, graph: ir.Graph, factor: Double) -> dict[str, str]:
        """In the convolution's weight and bias; a Mul gives the gate u as it was."""
        _divide_outputs(graph, self.convolution, factor)
        write, value = Writer(graph, self.gate), self.value
        number = _single(factor.reshape(-1, 1, 1))
        sizes = [] if value.shape is None else list(value.shape)
        factors = new_constant(graph, f"{value.name}_factor", number)
        whole = write.node("Mul", [value, factors], sizes, value, "whole")
        ends = (self.least * REACH, -self.least * (1 + 1e-6))
        low, high = (
            new_constant(graph, f"{value.name}_{name}", _single(np.array(end)))
            for name, end in zip(("least", "most"), ends, strict=True)
        )
        whole = write.node("Clip", [whole, low, high], sizes, value, "clipped")
        clip = next(iter(consumers(self.gate.outputs[0])))[0]
        open_above = write_behind(graph, clip, "Relu")
        graph.remove(clip, safe=True)
        open_above.name = clip.name
        self.gate.replace_input_with(0, whole)
        return {}

    @property
    def whole(self) -> str:
        """What the gate reads, once that was done."""
        read = self.gate.inputs[0]
        return "" if read is None else str(read.name)


@dataclass(frozen=True)
class Excited(Source):
    """A tensor times a small gate of floats, one number per channel: squeeze and excitation."""

    product: ir.Node
    index: int
    name: ClassVar[str] = "the small gate and the convolutions behind"

    def divide(self, graph: ir.Graph, factor: Double) -> dict[str, str]:
        """In a Mul of the small gate."""
        gate = self.product.inputs[self.index]
        made = _multiply(graph, self.product, self.index, 1 / factor)
        return {} if gate is None else {str(made.name): str(gate.name)}


@dataclass(frozen=True)
class Entering(Source):
    """What ops of floats make and convolutions alone read."""

    name: ClassVar[str] = "Mul"
    costs: ClassVar[bool] = True

    def divide(self, graph: ir.Graph, factor: Double) -> dict[str, str]:
        """In a Mul of its own."""
        made = _multiply_for_all(graph, self.value, 1 / factor, "equalized")
        return {str(made.name): str(self.value.name)}


@dataclass(frozen=True)
class Leaving(Source):
    """What a convolution gives, with or without Relu, and ops of floats alone read."""

    convolution: ir.Node
    name: ClassVar[str] = "Mul behind"
    costs: ClassVar[bool] = True

    def divide(self, graph: ir.Graph, factor: Double) -> dict[str, str]:
        """In its weight and bias; a Mul gives those that read it the tensor as it was."""
        _divide_outputs(graph, self.convolution, factor)
        _multiply_for_all(graph, self.value, factor, "whole")
        return {}


def sources(regions: Regions) -> list[Source]:
    """Every tensor of the regions whose factor can be taken in, as the data flows."""
    found: list[Source] = []
    for conv in regions.convolutions:
        gated = _gated(conv, regions)
        value = result_of(conv)
        maker = value.producer()
        if gated is not None:
            found.append(gated)
        elif all(map(is_constant, conv.inputs[1:])) and (
            maker is conv or (maker is not None and maker.op_type == "Relu")
        ):
            carried = Carried()
            if _follow(carried, value, regions) and carried.readers:
                found.append(Plain(value, carried, conv))
            elif _leaves(value, regions):
                found.append(Leaving(value, Carried(), conv))
    for node in regions.ops:
        small = [i for i, v in enumerate(node.inputs) if _is_small(v, regions)]
        if node.op_type == "Mul" and len(small) == 1:
            carried, value = Carried(), node.outputs[0]
            if _follow(carried, value, regions) and carried.readers:
                found.append(Excited(value, carried, node, small[0]))
    for value in regions.entering:
        maker, carried = value.producer(), Carried()
        if maker is None or _is_moved(value) or _is_small(value, regions):
            continue
        readers = [n for n, _ in consumers(value)]
        if regions.convolutions.issuperset(readers) and _follow(carried, value, regions):
            found.append(Entering(value, carried))
    order = {v: i for i, v in enumerate(regions.codes)}
    return sorted(found, key=lambda one: order.get(one.value, 0))


def _gated(conv: ir.Node, regions: Regions) -> Gated | None:
    value = conv.outputs[0]
    readers = [node for node, _ in consumers(value)]
    if len(readers) != 2 or value.is_graph_output() or not regions.ops.issuperset(readers):
        return None
    product = next((n for n in readers if n.op_type == "Mul"), None)
    gate = next((n for n in readers if n.op_type == "Add"), None)
    if product is None or gate is None or not _closes(gate, product):
        return None
    shift, carried = constant(gate.inputs[1]), Carried()
    if not _follow(carried, product.outputs[0], regions) or not carried.readers:
        return None
    if shift is None:
        return None
    number = float(shift.ravel()[0])
    return Gated(value, carried, conv, gate, -number, 2 * number)


def _is_small(value: ir.Value | None, regions: Regions) -> bool:
    """True for one float per channel and image that becomes codes."""
    if value is None or value not in regions.entering or value.shape is None:
        return False
    return list(value.shape)[2:] == [1, 1]


def _leaves(value: ir.Value, regions: Regions) -> bool:
    """True for codes that become floats for all that read them."""
    inside = regions.convolutions | regions.ops
    readers = [node for node, _ in consumers(value)]
    return bool(readers) and not value.is_graph_output() and inside.isdisjoint(readers)


def _is_moved(value: ir.Value) -> bool:
    """True for what layout ops make, whose channels may have been on another axis; not of what they
    copy or join."""
    node = value.producer()
    if node is None or not is_layout(node):
        return False
    if node.op_type not in ("Identity", "Concat"):
        return True
    return any(v is not None and _is_moved(v) for v in node.inputs)


def write_behind(graph: ir.Graph, clip: ir.Node, op: str) -> ir.Node:
    """An op of one input in place of a Clip, whose name its output takes."""
    node, old = ir.node(op, [clip.inputs[0]], num_outputs=1), clip.outputs[0]
    made, name = node.outputs[0], old.name
    made.type, made.shape = old.type, old.shape
    node.metadata_props.update(clip.metadata_props)
    graph.insert_before(clip, node)
    old.replace_all_uses_with(made)
    old.name, made.name = f"{name}_replaced", name
    return node


def _divide_outputs(graph: ir.Graph, conv: ir.Node, factor: Double) -> None:
    _replace(graph, conv, 1, _array(conv.inputs[1]) / factor.reshape(-1, 1, 1, 1))
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        _replace(graph, conv, 2, _array(conv.inputs[2]) / factor)


def _multiply(graph: ir.Graph, node: ir.Node, index: int, factor: Double) -> ir.Value:
    """Let the node read its input times the factor [C]."""
    value = node.inputs[index]
    assert value is not None
    made = _multiplied(graph, node, value, factor, "equalized")
    node.replace_input_with(index, made)
    return made


def _multiplied(
    graph: ir.Graph, node: ir.Node, value: ir.Value, factor: Double, name: str
) -> ir.Value:
    """The value times the factor [C], in front of the node."""
    number = new_constant(graph, f"{value.name}_factor", _single(factor.reshape(-1, 1, 1)))
    sizes = [] if value.shape is None else list(value.shape)
    return Writer(graph, node).node("Mul", [value, number], sizes, value, name)


def _multiply_for_all(graph: ir.Graph, value: ir.Value, factor: Double, name: str) -> ir.Value:
    """Let all that read the value read it times the factor [C]; readers are in no order, and the
    Mul stands in front of the one that runs first."""
    uses = list(consumers(value))
    readers = {node for node, _ in uses}
    first = next(node for node in graph if node in readers)
    made = _multiplied(graph, first, value, factor, name)
    for node, index in uses:
        node.replace_input_with(index, made)
    return made


def _closes(gate: ir.Node, product: ir.Node) -> bool:
    """True where the product's other factor is the clipped sum."""
    behind = [n for n, _ in consumers(gate.outputs[0])]
    if len(behind) != 1 or behind[0].op_type != "Clip" or not is_constant(gate.inputs[1]):
        return False
    made = behind[0].outputs[0]
    return made in product.inputs and len(list(consumers(made))) == 1


def _follow(one: Carried, value: ir.Value, regions: Regions) -> bool:
    """Collect what carries the factor on; False where something cannot take it in."""
    one.values.append(value)
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
            if len(dims) != 4 or dims[2:] != [1, 1] or other in one.values:
                return False
        elif node.op_type not in PASSING:
            return False
        if not _follow(one, node.outputs[0], regions):
            return False
    return True


def choose_factors(
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
