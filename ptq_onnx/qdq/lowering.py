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
from ptq_onnx.numerics.around.around import Around, Restore
from ptq_onnx.numerics.fake_quantize import quantize
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.qdq.factors import FactorPlan, Place, leaves, plan_factors, quantized_values, way
from ptq_onnx.qdq.nodes import Behind, Nodes


@dataclass
class _Lowering(Nodes):
    """The state of lowering one graph, changed in place."""

    specs: Mapping[str, TensorSpec]
    renormalized: dict[ir.Value, ir.Value] = field(default_factory=dict)
    """A·V outputs that are divided by row sums: the quotient, by the product's output."""
    factors: FactorPlan = field(default_factory=lambda: FactorPlan({}))
    """Decided before the first node is put in."""
    columns: dict[ir.Node, Factor] = field(default_factory=dict)
    """What the output channels of linears and convolutions are divided by."""

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
        out = spec.rule.code.emit(builder, current, numbers)
        for restore in restores:
            self.behind_product(value, out, uses, restore)
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
    ) -> None:
        """Let products that read ``value`` as the given input read ``out``, and restore behind
        them; other readers get ``out`` with that done."""
        op, other, suffix, index = restore.op_type, restore.other, restore.suffix, restore.index
        products = [use for use in uses if is_product(use[0]) and use[1] == index]
        plain = [use for use in uses if use not in products]
        for node, _ in products:
            result = self.renormalized.get(node.outputs[0], node.outputs[0])
            readers = list(consumers(result))
            back = self.add(result.producer(), op, [result, other], result, suffix)
            self.renormalized[node.outputs[0]] = back
            self.redirect(result, readers, back)
        self.redirect(value, products, out, outputs=False)
        if plain or value.is_graph_output():
            real = self.add(out.producer(), op, [out, other], value, suffix)
            self.redirect(value, plain, real)

    def redirect(
        self,
        value: ir.Value,
        uses: list[tuple[ir.Node, int]],
        new: ir.Value,
        outputs: bool = True,
    ) -> None:
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

    # --- weights and products -----------------------------------------------------------

    def linear(self, node: ir.Node) -> None:
        """Quantized weight codes and DequantizeLinear in place of the float weight."""
        weight = node.inputs[1]
        columns = self.columns.get(node)
        if weight is None or weight.const_value is None:
            return
        spec = self.specs.get(str(weight.name))
        if columns is not None:
            self.scale_bias(node, columns)
        if spec is None:
            if columns is not None:
                scaled = weight.const_value.numpy() / columns
                node.replace_input_with(1, self.constant(f"{weight.name}_scaled", scaled))
            return
        self.keep_from_gemm(node)
        if spec.rule.grain.block_size:
            node.replace_input_with(1, self.weight(node, weight, spec))
            return
        scale = np.asarray(spec.scale if columns is None else spec.scale / columns, np.float32)
        if spec.factor is not None and (node, 0) not in self.factors.taken:
            real = self.weight(node, weight, spec, scale)
            factor = self.constant(f"{weight.name}_factor", spec.factor)
            real = self.add(real.producer(), "Mul", [real, factor], weight, "rescaled")
        elif reads_codes(node.inputs[0]):
            real = self.weight(node, weight, spec, scale)
        else:
            # A float product: the scale goes into a Mul, or ONNX Runtime would make a
            # MatMulNBits of it, which rounds the float input to 8 bits (measured, 1.31).
            by = self.constant(f"{weight.name}_scale", scale)
            real = self.weight(node, weight, spec, np.array(1, np.float32))
            real = self.add(real.producer(), "Mul", [real, by], weight, "rescaled")
        node.replace_input_with(1, real)

    def convolution(self, node: ir.Node) -> None:
        """As ``linear``: rows are input channels, columns output channels."""
        weight = node.inputs[1]
        columns = self.columns.get(node)
        if weight is None or weight.const_value is None:
            return
        self.codes_at(node)
        spec = self.specs.get(str(weight.name))
        if columns is not None:
            self.scale_bias(node, columns)
        if spec is None:
            if columns is not None:
                scaled = weight.const_value.numpy() / spread(columns, weight)
                node.replace_input_with(1, self.constant(f"{weight.name}_scaled", scaled))
            return
        scale = np.asarray(spec.scale if columns is None else spec.scale / columns, np.float32)
        real = self.weight(node, weight, spec, scale)
        if spec.factor is not None and (node, 0) not in self.factors.taken:
            factor = self.constant(f"{weight.name}_factor", spec.factor)
            real = self.add(real.producer(), "Mul", [real, factor], weight, "rescaled")
        node.replace_input_with(1, real)

    def codes_at(self, node: ir.Node) -> None:
        """The same codes once more in front of a convolution that reads them behind a Split or a
        Slice, over which ONNX Runtime does not move DequantizeLinear. Nothing is rounded twice."""
        read = node.inputs[0]
        before, cut = read, False
        maker = None if before is None else before.producer()
        while maker is not None and is_layout(maker):
            cut = cut or maker.op_type in ("Split", "Slice", "Gather")
            before = maker.inputs[0]
            maker = None if before is None else before.producer()
        if read is None or not cut or maker is None or maker.op_type != "DequantizeLinear":
            return
        scale, zero_point = maker.inputs[1:3]
        if zero_point is None or zero_point.const_value is None:
            return
        steps: list[tuple[str, list[ir.Value | None], str, ir.DataType | None]] = [
            (
                "QuantizeLinear",
                [scale, zero_point],
                "again_quantized",
                zero_point.const_value.dtype,
            ),
            ("DequantizeLinear", [scale, zero_point], "again_dequantized", None),
        ]
        node.replace_input_with(0, self.chain(read, steps, read))

    def scale_bias(self, node: ir.Node, columns: Factor) -> None:
        """Divide the bias, where there is one, like the columns."""
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and bias.const_value is not None:
            new = self.constant(f"{bias.name}_scaled", bias.const_value.numpy() / columns)
            node.replace_input_with(2, new)

    def keep_from_gemm(self, node: ir.Node) -> None:
        """Give the bias the rank of the output where all sizes are fixed.

        ONNX Runtime would make a Gemm of the product and a bias vector, and compute it in float
        (measured, 1.31); with a dynamic batch it does not.
        """
        shape, bias = node.outputs[0].shape, node.inputs[2] if len(node.inputs) > 2 else None
        if shape is None or bias is None or bias.const_value is None:
            return
        if all(isinstance(d, int) for d in shape) and len(shape) > 2:
            array = bias.const_value.numpy().reshape(*[1] * (len(shape) - 1), -1)
            node.replace_input_with(2, self.constant(f"{bias.name}_ranked", array))

    def weight(
        self, node: ir.Node, weight: ir.Value, spec: TensorSpec, scale: Factor | None = None
    ) -> ir.Value:
        """DequantizeLinear of the weight's codes, before ``node``, by the spec's scale or by
        ``scale`` ([] or along the spec's axis). Weights are symmetric, zero point 0, but for
        those in blocks, whose codes are uint4."""
        if weight.const_value is None:
            return weight
        codes = quantize(np.asarray(weight.const_value.numpy(), np.float32), spec)
        scale = np.asarray(spec.scale, np.float32) if scale is None else scale
        rule, same = spec.rule, scale.shape == spec.zero_point.shape
        zero = spec.zero_point if same else np.zeros(scale.shape, np.int32)
        stored, point = (
            rule.code.stored(v, rule.grain.storage, rule.signed) for v in (codes, zero)
        )
        inputs: list[ir.Value | None] = [
            self.constant(f"{weight.name}_quantized", stored),
            self.constant(f"{weight.name}_scale", scale),
            self.constant(f"{weight.name}_zero_point", point),
        ]
        attributes = {} if scale.ndim == 0 or spec.axis is None else {"axis": spec.axis}
        if rule.grain.block_size:
            attributes["block_size"] = rule.grain.block_size
        previous = ir.node(
            "DequantizeLinear",
            inputs,
            attributes,
            name=self.unique(f"{weight.name}_dequantize"),
            num_outputs=1,
        )
        output = previous.outputs[0]
        output.name = self.unique(f"{weight.name}_dequantized")
        output.shape, output.type = weight.shape, weight.type
        self.graph.insert_before(node, previous)
        return output

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

    def constants(self, node: ir.Node) -> None:
        """Quantized constants that are added to activations."""
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None or is_layout(node):
                continue
            spec = self.specs.get(str(value.name))
            if spec is None:
                continue
            real = self.weight(node, value, spec)
            if spec.factor is not None:
                factor = self.constant(f"{value.name}_factor", spec.factor)
                real = self.add(real.producer(), "Mul", [real, factor], value, "rescaled")
            node.replace_input_with(index, real)


def reads_codes(value: ir.Value | None) -> bool:
    """True where a product's input comes straight from DequantizeLinear, but for layout ops."""
    node = None if value is None else value.producer()
    while node is not None and is_layout(node):
        before = node.inputs[0]
        node = None if before is None else before.producer()
    return node is not None and node.op_type == "DequantizeLinear"


def spread(columns: Factor, weight: ir.Value) -> Factor:
    """[N] against a convolution's weight [N, C, …]."""
    rank = 1 if weight.shape is None else len(weight.shape)
    return columns.reshape(-1, *[1] * (rank - 1))


def lower(model: ir.Model, specs: Mapping[str, TensorSpec]) -> ir.Model:
    """A copy of ``model`` with every tensor of ``specs`` quantized and dequantized.

    The fused linears stay (the caller expands them); everything else is standard ONNX.
    """
    copy = model.clone()
    lowering = _Lowering(copy.graph, specs)
    lowering.run()
    _remove_copies(copy.graph)
    _remove_unused(copy.graph)
    return copy


def _remove_copies(graph: ir.Graph) -> None:
    """Let the readers of copies (``equalization/reads.py``) read what was copied."""
    for node in list(graph):
        read = node.inputs[0] if node.op_type == "Identity" else None
        if read is not None and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(read)
            graph.remove(node, safe=True)


def _remove_unused(graph: ir.Graph) -> None:
    for name in [n for n, v in graph.initializers.items() if not v.uses()]:
        if not graph.initializers[name].is_graph_output():
            del graph.initializers[name]
