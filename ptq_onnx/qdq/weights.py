"""Constants that are lowered: weights, the biases beside them, and what is added to activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.channels import Factor
from ptq_onnx.blocks.walking import is_layout
from ptq_onnx.numerics.fake_quantize import quantize
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.qdq.factors import FactorPlan
from ptq_onnx.qdq.nodes import Nodes

ORDER = "order"
"""In what a weight's codes carry with them: its rows in the order of their blocks."""


@dataclass
class Weights(Nodes):
    """The state of lowering one graph, as far as its constants need it; changed in place."""

    specs: Mapping[str, TensorSpec]
    factors: FactorPlan = field(default_factory=lambda: FactorPlan({}))
    """Decided before the first node is put in."""
    columns: dict[ir.Node, Factor] = field(default_factory=dict)
    """What the output channels of linears and convolutions are divided by."""

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
            own = np.ones(spec.zero_point.shape if spec.zero_point.any() else (), np.float32)
            real = self.weight(node, weight, spec, own)
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
        ``scale`` ([] or along the spec's axis). Codes of weights in blocks are uint4."""
        if weight.const_value is None:
            return weight
        codes = quantize(np.asarray(weight.const_value.numpy(), np.float32), spec)
        scale = np.asarray(spec.scale, np.float32) if scale is None else scale
        rule, same = spec.rule, scale.shape == spec.zero_point.shape
        zero = spec.zero_point if same else np.zeros(scale.shape, np.int32)
        # A number beside codes of activations is of their type; a weight's codes are its grain's.
        beside = not rule.signed and not rule.grain.block_size
        storage = rule.stored if beside else rule.grain.storage
        stored, point = (rule.code.stored(v, storage, rule.signed) for v in (codes, zero))
        held = self.constant(f"{weight.name}_quantized", stored)
        if spec.order is not None:
            held.meta[ORDER] = spec.order
        inputs: list[ir.Value | None] = [
            held,
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
