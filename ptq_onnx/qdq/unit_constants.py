"""Codes for the constants of units: weights, biases, γ and β, numbers beside activations."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.graph.codings import DEQUANTIZE
from ptq_onnx.qdq.nodes import Nodes
from ptq_onnx.qdq.unit_numbers import (
    UINT8,
    UINT16,
    Numbers,
    is_float,
    limits_of,
    numbers_of,
    quantizers,
    representable,
)

LARGEST_BIAS = 2.0**31 - 1
INT4 = -8, 7
PARAMETERS = {"Clip": (0,), "Resize": (0,)}
"""Inputs that are data, of ops whose other inputs are not."""


class UnitConstants(Nodes):
    """Puts the constants of one graph's ops on codes, in place."""

    def constants_of(self, node: ir.Node, dtype: ir.DataType) -> None:
        """Codes for an op's constants, of ``dtype`` where nothing else is said of them."""
        weighted = is_linear(node) or node.op_type in ("Conv", "ConvTranspose", "Gemm")
        norm = node.op_type == "LayerNormalization"
        if weighted and dtype == UINT16:
            self.take_exact_scales(node)
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None or not is_float(value):
                continue
            if weighted and index == 2:
                self.bias(node, value)
            elif norm and index == 2:
                self.shift(node, value)
            elif norm:
                self.parameter(node, index, value, UINT8)
            elif not weighted and takes(node, index):
                self.parameter(node, index, value, dtype)
        if weighted:
            self.pack(_maker(node.inputs[1]))

    def take_exact_scales(self, node: ir.Node) -> None:
        """Scales of a weight's channels, moved by at most 1/2048, with which what HTP multiplies
        its sums by has no more than the bits that it takes (``representable``)."""
        weight = _maker(node.inputs[1])
        data = numbers_of(node.inputs[0])
        made = quantizers(node.outputs[0])
        held = None if weight is None or weight.op_type != DEQUANTIZE else weight.inputs[1]
        if weight is None or data is None or not made or held is None or held.const_value is None:
            return
        scale = np.asarray(held.const_value.numpy(), np.float64)
        if scale.ndim == 1:
            step = float(made[0].scale) / float(data.scale)
            new = (representable(scale / step) * step).astype(np.float32)
            weight.replace_input_with(1, self.constant(f"{held.name}_exact", new))

    def pack(self, weight: ir.Node | None) -> None:
        """Store a weight's codes in 4 bits where they need no more. Only with a scale per channel:
        with one for all, HTP's provider (2.7.0) reads int4 codes wrongly (−22 dB, measured)."""
        held = None if weight is None else weight.inputs[0]
        if weight is None or held is None or held.const_value is None:
            return
        codes, scale, zero = held.const_value.numpy(), weight.inputs[1], weight.inputs[2]
        low, high = codes.min(initial=0), codes.max(initial=0)
        if codes.dtype != np.int8 or low < INT4[0] or high > INT4[1]:
            return
        if scale is None or scale.const_value is None or zero is None or not scale.const_value.size:
            return
        if scale.const_value.shape.rank() == 1:
            name, points = str(weight.outputs[0].name), np.zeros(scale.const_value.size)
            weight.replace_input_with(
                0, self.constant(f"{name}_int4", codes.astype(ml_dtypes.int4))
            )
            weight.replace_input_with(
                2, self.constant(f"{name}_zero_int4", points.astype(ml_dtypes.int4))
            )

    def parameter(self, node: ir.Node, index: int, value: ir.Value, dtype: ir.DataType) -> None:
        """γ, and what is added to activations or multiplied with them: one scale."""
        held = np.append(array_of(value), 0)  # which codes hold in any case
        numbers = Numbers.over(float(held.min()), float(held.max()), dtype)
        node.replace_input_with(index, self.coded_constant(value, numbers, node))

    def shift(self, norm: ir.Node, value: ir.Value) -> None:
        """β of a norm: int32 codes in steps of the output; without one where it is zero."""
        array = array_of(value)
        made = quantizers(norm.outputs[0])
        if not array.any():
            norm.resize_inputs(2)
        elif made:
            scale = made[0].scale
            codes = np.rint(array / scale).astype(np.int32)
            point = np.array(0, np.int32)
            norm.replace_input_with(2, self.stored(value, codes, np.float32(scale), point, norm))

    def coded_constant(self, value: ir.Value, numbers: Numbers, node: ir.Node) -> ir.Value:
        """DequantizeLinear of a constant's codes, in front of ``node``."""
        low, high = limits_of(numbers.dtype)
        codes = np.clip(np.rint(array_of(value) / numbers.scale) + numbers.zero, low, high)
        kind = numbers.dtype.numpy()
        point = np.array(numbers.zero, kind)
        return self.stored(value, codes.astype(kind), np.float32(numbers.scale), point, node)

    def bias(self, node: ir.Node, value: ir.Value) -> None:
        """int32 codes, whose scale is that of the product, per output channel as the weight's."""
        weight = _maker(node.inputs[1])
        data = numbers_of(node.inputs[0])
        scales = None if weight is None else weight.inputs[1]
        if weight is None or weight.op_type != DEQUANTIZE or data is None or scales is None:
            return
        array = array_of(value).reshape(-1)
        scale = self.roomy(weight, array, float(data.scale)) * float(data.scale)
        codes = np.clip(np.rint(array / scale), -LARGEST_BIAS, LARGEST_BIAS).astype(np.int32)
        zero = np.zeros(scale.shape, np.int32)
        made = self.stored(value, codes, scale.astype(np.float32), zero, node)
        made.shape = ir.Shape(codes.shape)
        node.replace_input_with(2, made)

    def roomy(self, weight: ir.Node, bias: NDArray[np.float32], step: float) -> NDArray[np.float64]:
        """The weight's scales, made larger where the bias would not fit 32 bits, its codes with
        them."""
        codes, scales = (v.const_value.numpy() for v in weight.inputs[:2])  # type: ignore[union-attr]
        scale = np.asarray(scales, np.float64)
        least = np.abs(bias.astype(np.float64)) / (LARGEST_BIAS * step)
        wanted = np.maximum(scale, least if scale.ndim else least.max(initial=0))
        if np.array_equal(wanted, scale):
            return scale
        name = str(weight.outputs[0].name)
        axis = weight.attributes.get_int("axis", 0)
        shape = [-1 if i == axis else 1 for i in range(codes.ndim)] if scale.ndim else []
        fewer = np.rint(codes * (scale / wanted).reshape(shape)).astype(codes.dtype)
        weight.replace_input_with(0, self.constant(f"{name}_fewer_codes", fewer))
        weight.replace_input_with(1, self.constant(f"{name}_larger", wanted.astype(np.float32)))
        return wanted

    def stored(
        self,
        value: ir.Value,
        codes: NDArray[np.generic],
        scale: NDArray[np.float32] | np.float32,
        zero: NDArray[np.generic],
        node: ir.Node,
    ) -> ir.Value:
        """Codes as an initializer, dequantized in front of ``node``."""
        inputs = [
            self.constant(f"{value.name}_codes", codes),
            self.constant(f"{value.name}_scale", scale),
            self.constant(f"{value.name}_zero_point", zero),
        ]
        attributes = {"axis": 0} if np.ndim(scale) else {}
        made = ir.node(DEQUANTIZE, inputs, attributes, name=self.unique(f"{value.name}_dequantize"))
        output = made.outputs[0]
        output.name = self.unique(f"{value.name}_dequantized")
        output.shape, output.type = value.shape, value.type
        self.graph.insert_before(node, made)
        return output


def takes(node: ir.Node, index: int) -> bool:
    """Whether an input holds numbers that the op computes with."""
    return index in PARAMETERS.get(node.op_type, (index,))


def array_of(value: ir.Value) -> NDArray[np.float32]:
    """The numbers of a constant."""
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float32)


def _maker(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()
