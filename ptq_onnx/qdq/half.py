"""The float part of a lowered graph in 16 bits; codes, inputs and outputs stay as they are.

A scale's type is that of the floats around its Q/DQ (ONNX, QuantizeLinear-19), so that scales,
parameters, activations and the types in attributes change together. What is defined in 32 bits
stays there: the variance of LayerNormalization (its ``stash_type``), and the norms that are
expanded to squares, which would leave the range of 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import consumers
from ptq_onnx.errors import ModelError
from ptq_onnx.graph.codings import is_coding
from ptq_onnx.graph.formula import new_constant, unique_name
from ptq_onnx.qdq.small_scales import SMALLEST_NORMAL, enlarge_small_scales
from ptq_onnx.qdq.sums import sums_to_means

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST = 65504.0
IN_FLOAT = ("RMSNormalization", "L2Normalization")
"""Ops computed in 32 bits: they sum squares."""
TYPES = ("to", "dtype", "output_dtype")
"""Attributes that name an element type."""

Use = tuple[ir.Node, int]


def to_float16(model: ir.Model) -> ir.Model:
    """A copy whose floats have 16 bits between a Cast behind each input and before each output.

    Raises ModelError for a scale or a constant that 16 bits do not hold.
    """
    copy = model.clone()
    graph = copy.graph
    enlarge_small_scales(graph)
    sums_to_means(graph)
    nodes = list(graph)
    for value in list(graph.initializers.values()):
        _convert_constant(graph, value)
    for node in nodes:
        _convert_attributes(node)
        kept = {"LayerNormalization": 1}.get(node.op_type, len(node.outputs))
        for value in node.outputs[:kept]:
            if value.dtype == FLOAT:
                value.type = ir.TensorType(HALF)
    for value in [v for v in graph.inputs if v.dtype == FLOAT and not v.is_initializer()]:
        _cast(graph, value, HALF, consumers(value), None)
    for node in nodes:
        _stay_in_float(graph, node)
    for position, value in enumerate(graph.outputs):
        if value.dtype == HALF:
            name = str(value.name)
            value.name = unique_name(graph, f"{name}_half")
            graph.outputs[position] = _cast(graph, value, FLOAT, (), value.producer(), name)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    return copy


def half(array: NDArray[np.generic], name: str, scale: bool = False) -> NDArray[np.float16]:
    """The array in 16 bits, rounded to nearest. Raises ModelError beyond their range.

    Scales must be normal numbers (11 bits of precision); a lone number must not become zero,
    because it may be what keeps a divisor from being zero.
    """
    size = np.abs(np.asarray(array, np.float32))
    finite = size[np.isfinite(size)]
    largest, smallest = finite.max(initial=0.0), size.min(initial=np.inf)
    if largest > LARGEST:
        found = f"at most {LARGEST:.0f}, found {largest:g}"
    elif scale and smallest < SMALLEST_NORMAL:
        found = f"at least 2^-14 ({SMALLEST_NORMAL:.3g}) in a scale, found {smallest:g}"
    elif array.size == 1 and largest > 0 and array.astype(np.float16) == 0:
        found = f"a number that 16 bits hold, found {largest:g}"
    else:
        return np.asarray(array.astype(np.float16))
    raise ModelError(f"Constant '{name}': expected {found}; leave out --float16.")


def _wants_float(use: Use) -> bool:
    """True for what must be float32: inputs of those norms, and the scales of Resize."""
    node, index = use
    return node.op_type in IN_FLOAT or (node.op_type, index) == ("Resize", 2)


def _convert_constant(graph: ir.Graph, value: ir.Value) -> None:
    """A new tensor for the readers in 16 bits; the others keep the old one."""
    tensor = value.const_value
    uses = list(consumers(value))
    readers = [use for use in uses if not _wants_float(use)]
    if tensor is None or tensor.dtype != FLOAT or not readers:
        return
    scale = any(is_coding(node) and index == 1 for node, index in readers)
    array = half(tensor.numpy(), str(value.name), scale)
    if len(readers) == len(uses):
        value.const_value = ir.Tensor(array, name=value.name)
        value.type = ir.TensorType(HALF)
        return
    _redirect(readers, new_constant(graph, f"{value.name}_half", array))


def _convert_attributes(node: ir.Node) -> None:
    """Types, and numbers, that attributes hold."""
    for name in TYPES:
        if node.attributes.get_int(name, 0) == FLOAT:
            node.attributes[name] = ir.AttrInt64(name, int(HALF))
    if node.op_type not in ("Constant", "ConstantOfShape"):
        return
    array = _held(node)
    if array is not None and array.dtype == np.float32:
        node.attributes.clear()
        tensor = ir.Tensor(half(array, str(node.outputs[0].name)))
        node.attributes["value"] = ir.AttrTensor("value", tensor)


def _held(node: ir.Node) -> NDArray[np.generic] | None:
    """What a Constant or ConstantOfShape holds; None where that is no tensor of numbers."""
    given = node.attributes.get("value")
    if given is not None:
        return given.as_tensor().numpy()
    if node.op_type == "ConstantOfShape":
        return np.zeros(1, np.float32)
    for name, kind in (("value_float", ir.AttributeType.FLOAT), ("value_floats", None)):
        given = node.attributes.get(name)
        if given is not None:
            return np.asarray(given.as_float() if kind else given.as_floats(), np.float32)
    return None


def _stay_in_float(graph: ir.Graph, node: ir.Node) -> None:
    """Cast what a node takes in 32 bits, and what it gives back to 16."""
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype == HALF and _wants_float((node, index)):
            _cast(graph, value, FLOAT, [(node, index)], value.producer())
    if node.op_type in IN_FLOAT:
        output = node.outputs[0]
        output.type = ir.TensorType(FLOAT)
        result = _cast(graph, output, HALF, consumers(output), node)
        for position, value in enumerate(graph.outputs):
            if value is output:
                result.name, output.name = output.name, result.name
                graph.outputs[position] = result


def _cast(
    graph: ir.Graph,
    value: ir.Value,
    dtype: ir.DataType,
    uses: Iterable[Use],
    anchor: ir.Node | None,
    name: str | None = None,
) -> ir.Value:
    """A Cast behind ``anchor`` (None: first in the graph), which those uses read."""
    readers = list(uses)  # without the Cast itself
    node = ir.node("Cast", [value], {"to": int(dtype)}, num_outputs=1)
    result = node.outputs[0]
    result.name = name or unique_name(graph, f"{value.name}_{dtype.name.lower()}")
    result.type, result.shape = ir.TensorType(dtype), value.shape
    node.name = f"{result.name}_cast"
    _redirect(readers, result)
    if anchor is None:
        graph.insert_before(next(iter(graph)), node)
    else:
        graph.insert_after(anchor, node)
    return result


def _redirect(uses: Iterable[Use], value: ir.Value) -> None:
    for node, index in uses:
        node.replace_input_with(index, value)
