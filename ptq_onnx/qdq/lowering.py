"""Turns a fused graph and its specs into standard ONNX with QuantizeLinear/DequantizeLinear.

One function serves two masters: the exporter lowers the whole graph, the exact simulator
lowers one node at a time and runs it in ONNX Runtime. So both compute the same numbers.

A per-channel factor f never becomes a per-axis Q/DQ on an activation (ONNX Runtime's
optimizer breaks those around Add and MatMul). The tensor is divided by f before a scalar
Q/DQ, and multiplied by f behind it. Either multiplication disappears where it can be moved
exactly (f a power of two): into LayerNormalization's scale and bias, into the columns of
the linear that makes the tensor, into the rows of the weight that reads it (which were
quantized with the factor), between q and k, and through A·V. Which of these, ``factors.py``
decides before the first node is put in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.channels import Factor, is_convolution
from ptq_onnx.blocks.walking import consumers, is_layout, is_linear, is_product
from ptq_onnx.graph.bounded import bound_of, release
from ptq_onnx.numerics.around.around import Around, Restore
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.qdq.factors import Place, leaves, plan_factors, quantized_values, way
from ptq_onnx.qdq.nodes import Behind, remove_unused
from ptq_onnx.qdq.weights import Weights

END = 1 + 1e-5
"""Codes end at a bound where their largest value is at most this many times it."""


@dataclass
class _Lowering(Weights):
    """The state of lowering one graph, changed in place."""

    renormalized: dict[ir.Value, ir.Value] = field(default_factory=dict)
    """A·V outputs that are divided by row sums: the quotient, by the product's output."""

    # --- activations --------------------------------------------------------------------

    def activation(self, value: ir.Value, spec: TensorSpec, place: Place | None) -> None:
        """Quantize and dequantize one activation; point its readers at the result."""
        uses = [(node, i) for node, i in consumers(value) if node.op_type != "Shape"]
        builder, numbers = Behind(self, value, value.producer()), spec.numbers(None)
        current, restores = value, []
        for around in spec.rule.around:
            made = around.before(builder, current, numbers)
            if made is not None:
                current, restore = made
                restores.append(restore)
        if spec.factor is not None and place is not None and place.before == "mul":
            inverse = builder.constant("inverse_factor", 1 / spec.factor)
            current = builder.op("Mul", [current, inverse], "scaled")
        whole = (around.emit_codes(builder, current) for around in spec.rule.around)
        found = next((made for made in whole if made is not None), None)
        out = spec.rule.code.emit(builder, current, numbers) if found is None else found
        # A row's own factor is in its sum too: divided by that, a product has it no more.
        kept = any(around.cancels_row_factors for around in spec.rule.around)
        for restore in restores:
            self.behind_product(value, out, uses, restore, kept)
        if not restores:
            self.give(value, spec, out, uses, place)
        for around in spec.rule.around:
            self.behind_values(out, around)

    def give(
        self,
        value: ir.Value,
        spec: TensorSpec,
        out: ir.Value,
        uses: list[tuple[ir.Node, int]],
        place: Place | None,
    ) -> None:
        """Point the tensor's readers at its values, still divided by the factor where they take
        them so."""
        producer = value.producer()
        if producer is not None and producer.op_type == "Conv":
            # ONNX Runtime fuses a Conv whose output nothing but QuantizeLinear reads.
            shapes = [(node, i) for node, i in consumers(value) if node.op_type == "Shape"]
            self.redirect(value, shapes, out, outputs=False)
        if spec.factor is None or place is None:
            self.redirect(value, uses, out)
            return
        scaled = [use for use in uses if use in place.scaled]
        plain = [use for use in uses if use not in scaled]
        self.redirect(value, scaled, out, outputs=False)
        for use in plain:
            self.split_readers(value, use, out, place)
        if plain or value.is_graph_output():
            shape = self.constant(f"{value.name}_factor", spec.factor)
            real = self.add(out.producer(), "Mul", [out, shape], value, "rescaled")
            self.redirect(value, plain, real)

    def behind_product(
        self,
        value: ir.Value,
        out: ir.Value,
        uses: list[tuple[ir.Node, int]],
        restore: Restore[ir.Value],
        kept: bool = False,
    ) -> None:
        """Let products that read ``value`` as the given input read ``out``, and restore behind
        them, unless that is ``kept`` from them; other readers get ``out`` with that done."""
        op, other, suffix, index = restore.op_type, restore.other, restore.suffix, restore.index
        products = [
            (node, i)
            for node, i in uses
            if i == index and (is_product(node) or (is_linear(node) and index == 0))
        ]
        plain = [use for use in uses if use not in products]
        for node, _ in [] if kept else products:
            result = self.renormalized.get(node.outputs[0], node.outputs[0])
            readers = list(consumers(result))
            bias = self.without_bias(node)
            back = self.add(result.producer(), op, [result, other], result, suffix)
            if bias is not None:
                back = self.add(back.producer(), "Add", [back, bias], result, "biased")
            self.renormalized[node.outputs[0]] = back
            self.redirect(result, readers, back)
        self.redirect(value, products, out, outputs=False)
        if plain or value.is_graph_output():
            real = self.add(out.producer(), op, [out, other], value, suffix)
            self.redirect(value, plain, real)

    def without_bias(self, node: ir.Node) -> ir.Value | None:
        """Take the bias from a linear, which what is behind it comes before; None without one."""
        if not is_linear(node) or len(node.inputs) < 3:
            return None
        bias = node.inputs[2]
        node.resize_inputs(2)
        return bias

    def redirect(
        self,
        value: ir.Value,
        uses: list[tuple[ir.Node, int]],
        new: ir.Value,
        outputs: bool = True,
    ) -> None:
        """Let the uses read ``new`` in place of ``value``, and the graph's output too, which keeps
        its name."""
        for node, index in uses:
            node.replace_input_with(index, new)
        if outputs and value.is_graph_output():
            position = list(self.graph.outputs).index(value)
            self.graph.outputs[position] = new
            old = value.name
            value.name = self.unique(f"{old}_float")
            new.name = old

    # --- factors ------------------------------------------------------------------------

    def divide(self, place: Place, factor: Factor) -> None:
        """Put 1/f into the op that makes the tensor, as decided."""
        node = place.node
        if place.before == "norm" and node is not None:
            for index in (1, 2):
                old = node.inputs[index] if len(node.inputs) > index else None
                if old is not None and old.const_value is not None:
                    new = old.const_value.numpy() / factor
                    node.replace_input_with(index, self.constant(f"{old.name}_scaled", new))
        if place.columns is not None:
            linear, channels = place.columns.node, place.columns.index.ravel()
            weight = linear.inputs[1]
            if weight is not None and weight.shape is not None:
                width = weight.shape.numpy()[1 if is_linear(linear) else 0]
                scale = self.columns.setdefault(linear, np.ones(width, np.float32))
                scale[channels] = factor.ravel()

    def split_readers(
        self, value: ir.Value, use: tuple[ir.Node, int], out: ir.Value, place: Place
    ) -> None:
        """Give readers that take the scaled tensor, behind layout ops that others share, layout
        ops of their own on ``out``."""
        if not is_layout(use[0]) or use[1] != 0:
            return
        for node, index in leaves(use):
            steps = way(value, node.inputs[index])
            if (node, index) not in place.behind or steps is None:
                continue
            current = out
            for step, position in steps:
                copy = ir.node(
                    step.op_type,
                    [current, *step.inputs[1:]],
                    name=self.unique(f"{step.name}_scaled"),
                    num_outputs=len(step.outputs),
                )
                copy.attributes.update({a.name: a for a in step.attributes.values()})
                for new, old in zip(copy.outputs, step.outputs, strict=True):
                    new.name = self.unique(f"{old.name}_scaled")
                    new.shape, new.type = old.shape, old.type
                self.graph.insert_before(step, copy)
                current = copy.outputs[position]
            node.replace_input_with(index, current)

    def behind_values(self, values: ir.Value, around: Around) -> None:
        """What is done behind the products that read the values first."""
        for node, index in list(consumers(values)):
            if not is_product(node) or index != 0:
                continue
            out = node.outputs[0]
            uses = list(consumers(out))
            made = around.emit_behind(Behind(self, out, node), out, values)
            if made is not None:
                self.renormalized[out] = made
                self.redirect(out, uses, made)

    def run(self) -> None:
        """Write the whole graph: factors first, then activations, weights and products."""
        nodes = list(self.graph)
        values = [*self.graph.inputs, *(v for node in nodes for v in node.outputs)]
        self.names.update(str(v.name) for v in [*values, *self.graph.initializers.values()])
        quantized = quantized_values(self.graph, self.specs)
        self.factors = plan_factors(self.graph, self.specs)
        for value, place in self.factors.places.items():
            factor = quantized[value].factor
            if factor is not None:
                self.divide(place, factor)
        for value, spec in quantized.items():
            place_of = self.factors.places.get(value)
            self.activation(self.renormalized.get(value, value), spec, place_of)
        for node in nodes:
            if is_linear(node):
                self.linear(node)
            elif is_convolution(node):
                self.convolution(node)
            else:
                self.constants(node)


def lower(model: ir.Model, specs: Mapping[str, TensorSpec]) -> ir.Model:
    """A copy of ``model`` with every tensor of ``specs`` quantized and dequantized.

    The fused linears stay (the caller expands them); everything else is standard ONNX.
    """
    copy = model.clone()
    release_bounds(copy.graph, specs)
    lowering = _Lowering(copy.graph, specs)
    lowering.run()
    _remove_copies(copy.graph)
    remove_unused(copy.graph)
    return copy


def release_bounds(graph: ir.Graph, specs: Mapping[str, TensorSpec]) -> None:
    """Let the codes bound what an activation makes, where they end at its bound.

    A copy that alone is quantized (``equalization/reads.py``) stands for its original.
    """
    for node in graph:
        bound, made = bound_of(node), node.outputs[0]
        if bound is None or made.is_graph_output():
            continue
        read = {str(made.name)}
        if str(made.name) not in specs:
            copies = [use.node for use in made.uses()]
            if any(copy.op_type != "Identity" for copy in copies):
                continue
            read = {str(copy.outputs[0].name) for copy in copies}
        found = [specs.get(name) for name in read]
        if all(s is not None and _last_value(s) <= bound * END for s in found):
            release(node)


def _last_value(spec: TensorSpec) -> float:
    """The largest value that the codes hold; infinite where each run finds its own."""
    return spec.clip[1] if spec.rule.clip_of == "values" else np.inf


def _remove_copies(graph: ir.Graph) -> None:
    """Let the readers of copies (``equalization/reads.py``) read what was copied."""
    for node in list(graph):
        read = node.inputs[0] if node.op_type == "Identity" else None
        if read is not None and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(read)
            graph.remove(node, safe=True)
