"""Every op between input and output on codes: Q/DQ completed for runtimes without a float part.

Such a runtime takes an op as a unit: DequantizeLinear on every input, the op, QuantizeLinear on
its output. Lowering puts codes where tensors were calibrated; here the rest follows from those:

* layout ops keep their numbers: the same codes in front of them and behind; so do MaxPool and
  Resize, which HTP computes in float otherwise (measured);
* codes that are made behind layout ops are made at the op that computes the tensor already; where
  its parts have several ranges of one type, all have the range that holds them;
* all activations of a unit are of one type: narrower ones are converted, exactly, up to the widest
  (s / 257 and 257 z hold 8-bit codes in 16), but for the second factor of a product, which may be
  the narrower one;
* ops of ours are spelled by ops that such a runtime has; what stands between those gets its numbers
  from what it is computed of (x · c: those of x, times c; a sigmoid: 0 to 1);
* constants get codes too: biases of linears and convolutions int32 by the scales of the product, γ
  uint8 and β int32 by the scale of the output (HTP rounds β to steps of that: measured), all others
  the type of their unit; weights whose codes fit 4 bits are stored in int4.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.walking import consumers, is_product, keeps_range
from ptq_onnx.graph.codings import DEQUANTIZE, QUANTIZE, is_coding
from ptq_onnx.qdq.nodes import remove_unused
from ptq_onnx.qdq.spelling import spell
from ptq_onnx.qdq.unit_constants import UnitConstants, takes
from ptq_onnx.qdq.unit_numbers import (
    UINT8,
    UINT16,
    Numbers,
    behind,
    derived,
    is_data,
    is_float,
    joined,
    kept,
    numbers_of,
    quantizers,
)

ORDERING = ("Reshape", "Transpose")
"""Layout ops that keep all elements, as they are spelled here."""


@dataclass
class _Units(UnitConstants):
    """The state of completing one graph, changed in place."""

    converted: dict[tuple[ir.Value, Numbers], ir.Value] = field(default_factory=dict)
    floats: list[str] = field(default_factory=list)
    """Nodes with a tensor whose numbers nothing tells."""

    def run(self) -> None:
        """Codes for every tensor that an op makes, then one type in every unit."""
        values = [*self.graph.inputs, *(v for node in self.graph for v in node.outputs)]
        self.names.update(str(v.name) for v in [*values, *self.graph.initializers.values()])
        for value in values:
            if is_float(value) and not value.is_initializer():
                self.settle(value)
        for node in [n for n in self.graph if n.op_type == QUANTIZE]:
            self.narrow_early(node)
        for node in list(self.graph):
            if not is_coding(node) and not keeps_range(node) and node.op_type != "Constant":
                self.unite(node)
        for node in list(self.graph):
            self.keep_swish_apart(node)

    # --- numbers of every tensor --------------------------------------------------------

    def settle(self, value: ir.Value) -> None:
        """Give a tensor that an op makes its codes, where it has none."""
        node = value.producer()
        if node is not None and is_coding(node):
            return
        if node is not None and not any(map(is_data, node.inputs)):
            return
        own = set(quantizers(value))
        inner = kept(node) if node is not None and keeps_range(node) else None
        if node is not None and node.op_type == "Concat":
            inner = next(iter(own), None) or inner or joined(behind(value))
            if inner is not None:
                self.same_numbers(node, inner)
        numbers = inner or joined(own or behind(value)) or derived(node)
        if numbers is None:
            if value.uses() or value.is_graph_output():
                self.floats.append(str(value.name) if node is None else node.op_type)
            return
        alone = len(list(consumers(value))) == 1 and not value.is_graph_output()
        if not (alone and own == {numbers}):
            self.code(value, numbers)

    def code(self, value: ir.Value, numbers: Numbers) -> ir.Value:
        """Put Q and DQ behind a tensor, for all that read it; returns what is read now."""
        uses = [(n, i) for n, i in consumers(value) if n.op_type != "Shape"]
        real = self.pair(value.producer(), value, numbers)
        for node, index in uses:
            found = Numbers.of(node) if node.op_type == QUANTIZE else None
            if found is not None and found.dtype == numbers.dtype:
                self.adopt(node, real)
            else:
                node.replace_input_with(index, real)
        if value.is_graph_output():
            position = list(self.graph.outputs).index(value)
            self.graph.outputs[position] = real
            name = value.name
            value.name = self.unique(f"{name}_float")
            real.name = name
        return real

    def adopt(self, quantize: ir.Node, real: ir.Value) -> None:
        """Let what reads these codes read values with other numbers of the same type. A pair of
        its own behind them would go: ONNX Runtime merges two such pairs, and leaves the layout op
        in front of them between two scales, in float (measured, 1.31)."""
        for node, _ in list(consumers(quantize.outputs[0])):
            output = node.outputs[0]
            output.replace_all_uses_with(real, replace_graph_outputs=True)
            self.graph.remove(node, safe=True)
        self.graph.remove(quantize, safe=True)

    def pair(self, anchor: ir.Node | None, value: ir.Value, numbers: Numbers) -> ir.Value:
        """Q and DQ of a tensor, behind ``anchor``."""
        scale = self.constant(f"{value.name}_scale", np.float32(numbers.scale))
        point = np.array(numbers.zero, numbers.dtype.numpy())
        zero = self.constant(f"{value.name}_zero_point", point)
        codes = self.add(anchor, QUANTIZE, [value, scale, zero], value, "codes", numbers.dtype)
        return self.add(codes.producer(), DEQUANTIZE, [codes, scale, zero], value, "values")

    def same_numbers(self, concat: ir.Node, numbers: Numbers) -> None:
        """All inputs of a Concat with the numbers of what it makes."""
        for index, value in enumerate(concat.inputs):
            if value is None:
                continue
            if value.const_value is not None and is_float(value):
                concat.replace_input_with(index, self.coded_constant(value, numbers, concat))
            elif (found := numbers_of(value)) is not None and found != numbers:
                concat.replace_input_with(index, self.convert(value, numbers))

    def narrow_early(self, quantize: ir.Node) -> None:
        """Move a conversion to fewer bits in front of the ops that only order the tensor. HTP's
        compiler (2.7.0) finds no memory for a Reshape of five axes, a Transpose of 16 x 16 and a
        conversion behind them; nothing is rounded otherwise."""
        numbers = Numbers.of(quantize)
        while numbers is not None and numbers.dtype == UINT8:
            wide = _only_source(quantize, DEQUANTIZE)
            coded = None if wide is None else _only_source(wide, QUANTIZE)
            mover = None if coded is None else _only_source(coded, *ORDERING)
            if wide is None or coded is None or mover is None or Numbers.of(coded) == numbers:
                return
            before = mover.inputs[0]
            if before is None or numbers_of(before) is None:
                return
            quantize.replace_input_with(0, mover.outputs[0])
            self.graph.remove([wide, coded], safe=True)
            real = self.pair(before.producer(), before, numbers)
            mover.replace_input_with(0, real)
            back = real.producer()
            again = None if back is None else _only_source(back, QUANTIZE)
            if again is None:
                return
            quantize = again

    # --- one type in every unit ---------------------------------------------------------

    def unite(self, node: ir.Node) -> None:
        """One type for the activations of an op, and codes for its constants."""
        if not is_float(node.outputs[0]):
            return
        data = [
            (i, v)
            for i, v in enumerate(node.inputs)
            if v is not None and is_data(v) and takes(node, i)
        ]
        found = [numbers_of(v) for _, v in data]
        made = [n for v in node.outputs for n in quantizers(v)]
        if not data or None in found or not made:
            return
        wide = any(n is not None and n.dtype == UINT16 for n in [*found, *made])
        for (index, value), numbers in zip(data, found, strict=True):
            second = is_product(node) and index == 1
            if wide and numbers is not None and numbers.dtype == UINT8 and not second:
                node.replace_input_with(index, self.convert(value, numbers.wider()))
        for value in node.outputs:
            for numbers in set(quantizers(value)):
                if wide and numbers.dtype == UINT8:
                    self.code(value, numbers.wider())
        self.constants_of(node, UINT16 if wide else UINT8)

    def keep_swish_apart(self, node: ir.Node) -> None:
        """A Relu, which changes nothing, behind the sigmoid of x · sigmoid(x) in 16 bits: the
        emulator (2.7.0) makes one op of both, whose numbers are wrong in most shapes (−1 dB)."""
        if node.op_type != "Mul":
            return
        for index, value in enumerate(node.inputs):
            made = None if value is None else _origin(value)
            numbers = None if value is None else numbers_of(value)
            if value is None or made is None or made.op_type != "Sigmoid" or numbers is None:
                continue
            if numbers.dtype == UINT16 and made.inputs[0] is node.inputs[1 - index]:
                same = self.add(value.producer(), "Relu", [value], value, "kept")
                node.replace_input_with(index, self.pair(same.producer(), same, numbers))

    def convert(self, value: ir.Value, numbers: Numbers) -> ir.Value:
        """The tensor's values in other codes; once for all that want them."""
        key = value, numbers
        if key not in self.converted:
            self.converted[key] = self.pair(value.producer(), value, numbers)
        return self.converted[key]


def complete(model: ir.Model) -> list[str]:
    """Complete Q/DQ in a lowered model, in place; returns what stays in float."""
    spell(model)
    units = _Units(model.graph)
    units.run()
    remove_unused(model.graph)
    return units.floats


def _only_source(node: ir.Node, *kinds: str) -> ir.Node | None:
    """What makes a node's first input for it alone, where it is of one of these ops."""
    value = node.inputs[0]
    made = None if value is None else value.producer()
    if value is None or made is None or made.op_type not in kinds:
        return None
    return made if len(value.uses()) == 1 and not value.is_graph_output() else None


def _origin(value: ir.Value) -> ir.Node | None:
    """The op whose output a Q/DQ pair gives."""
    node = value.producer()
    for kind in (DEQUANTIZE, QUANTIZE):
        if node is None or node.op_type != kind or node.inputs[0] is None:
            return None
        node = node.inputs[0].producer()
    return node
