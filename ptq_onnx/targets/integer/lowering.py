"""Writes the fused graph and its specs as a model of integer ops.

Between the QuantizeLinear of the image and the DequantizeLinear of the logits every tensor
is an integer. Layout ops stay as they are, on bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.masks import SHUT_OUT
from ptq_onnx.blocks.sites import image_input
from ptq_onnx.blocks.walking import is_constant, name_of
from ptq_onnx.errors import ModelError
from ptq_onnx.numerics.fake_quantize import quantize
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.targets.integer.builder import FLOAT, I32, U8, Builder, type_of_codes
from ptq_onnx.targets.integer.fixed_point import MULTIPLIER_BITS
from ptq_onnx.targets.integer.nodes import make_plan
from ptq_onnx.targets.integer.plan import IntegerPlan, places

NAME = "{}_quantized"
"""Names of integer tensors, by the name of the fused graph's tensor."""


def lower_integer(
    model: ir.Model,
    specs: Mapping[str, TensorSpec],
    bits: int = MULTIPLIER_BITS,
    gelu: str = "table",
) -> ir.Model:
    """The model in integers, its multipliers ``bits`` wide, GELU by ``table`` or
    ``polynomial``. Raises ModelError, naming node and op, for what it cannot hold."""
    return _Lowering(model, make_plan(model, specs, bits=bits, gelu=gelu)).run()


class _Lowering:
    """Writes one graph."""

    def __init__(self, model: ir.Model, plan: IntegerPlan) -> None:
        self.model, self.plan = model, plan
        self.b = Builder()
        self.made: dict[ir.Value, ir.Value] = {}
        """Integer tensors by the fused graph's values; also shapes."""

    def run(self) -> ir.Model:
        """The integer model, with the inputs, outputs and metadata of the float one."""
        graph = self.model.graph
        image = image_input(self.model)
        source = ir.Value(name=image.name, shape=image.shape, type=image.type)
        self.b.unique(str(image.name))
        for output in graph.outputs:
            self.b.unique(str(output.name))
        assert self.plan.image is not None
        self.made[image] = self.quantized(source, self.plan.image)
        self.image, self.source = image, source
        for node in graph:
            self.b.prefix = name_of(node)
            if node in self.plan.steps:
                self.compute(node)
            elif node.op_type != "Constant":
                self.layout(node)
        outputs = [self.dequantized(value) for value in graph.outputs]
        new = ir.Graph(
            [source],
            outputs,
            nodes=self.b.nodes,
            initializers=self.b.constants,
            opset_imports={"": graph.opset_imports.get("", 21)},
            name=graph.name,
        )
        model = ir.Model(
            new,
            ir_version=self.model.ir_version,
            producer_name=self.model.producer_name,
            producer_version=self.model.producer_version,
        )
        model.metadata_props.update(self.model.metadata_props)
        return model

    def quantized(self, source: ir.Value, spec: TensorSpec) -> ir.Value:
        """The image's codes: the only op on floats before the logits' scale."""
        scale = self.b.constant(np.asarray(spec.scale, np.float32), f"{source.name}_scale")
        zero = self.b.number(spec.zero_point, U8)
        name = NAME.format(source.name)
        low, high = spec.rule.limits
        codes = self.b.op("QuantizeLinear", [source, scale, zero], U8, name=name)
        if (low, high) == (0, 255):
            return codes
        return self.b.op("Clip", [codes, self.b.number(low, U8), self.b.number(high, U8)], U8)

    def dequantized(self, value: ir.Value) -> ir.Value:
        """The logits: codes times their scale, and their factor where they have one."""
        spec = self.plan.specs[str(value.name)]
        scale = self.b.constant(np.asarray(spec.scale, np.float32), f"{value.name}_scale")
        zero = self.b.number(spec.zero_point, type_of_codes(spec.rule.limits[1]))
        self.b.prefix = str(value.name)
        output = self.b.op("DequantizeLinear", [self.made[value], scale, zero], FLOAT)
        if spec.factor is not None:
            factor = self.b.constant(spec.factor, f"{value.name}_factor")
            output = self.b.op("Mul", [output, factor], FLOAT)
        output.name, output.shape = value.name, value.shape
        return output

    def compute(self, node: ir.Node) -> None:
        """Write the nodes of a compute node's step."""
        planned = self.plan.steps[node]
        inputs = [self.made[value] for value in planned.inputs]
        output = node.outputs[0]
        self.made[output] = planned.step.emit(self.b, *inputs, NAME.format(output.name))

    def layout(self, node: ir.Node) -> None:
        """The same op on integers; shapes stay shapes."""
        inputs: list[ir.Value | None] = []
        for index, value in enumerate(node.inputs):
            inputs.append(None if value is None else self.input(node, index, value))
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            node.attributes.values(),
            num_outputs=len(node.outputs),
            name=self.b.unique(name_of(node)),
        )
        for mine, theirs in zip(copy.outputs, node.outputs, strict=True):
            kind = inputs[-1] if node.op_type == "Concat" else inputs[0]
            dtype = ir.DataType.INT64 if node.op_type == "Shape" or kind is None else kind.dtype
            mine.name = self.b.unique(NAME.format(theirs.name))
            mine.type = None if dtype is None else ir.TensorType(dtype)
            self.made[theirs] = mine
        self.b.nodes.append(copy)

    def input(self, node: ir.Node, index: int, value: ir.Value) -> ir.Value:
        """What a layout op reads: an integer tensor, a shape, or a constant as codes. Raises
        ModelError for a float constant without codes."""
        if value is self.image and node.op_type == "Shape":
            return self.source
        if not is_constant(value):
            return self.made[value]
        if value.const_value is None:
            raise ModelError(f"Node '{name_of(node)}' ({node.op_type}): input without a value.")
        array = value.const_value.numpy()
        if value in self.plan.masks:
            return self.b.number(array > SHUT_OUT, I32)
        if array.dtype.kind == "f":
            spec = self.spec_behind(node)
            if spec is None:
                raise ModelError(
                    f"Node '{name_of(node)}' ({node.op_type}): constant '{value.name}' stays in"
                    " float."
                )
            codes = quantize(np.asarray(array, np.float32), spec)
            array = codes.astype(np.uint8)
        return self.b.constant(array, str(value.name))

    def spec_behind(self, node: ir.Node) -> TensorSpec | None:
        """The spec of the place that a constant reaches through layout ops (class token)."""
        own = self.plan.specs.get(str(node.outputs[0].name))
        if own is not None:
            return own
        return next((spec for _, spec in places(node.outputs[0], self.plan.specs)), None)
