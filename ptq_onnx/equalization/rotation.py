"""Turns a residual stream by an orthogonal matrix, equal in float and free at run time.

Every writer gets W R, every reader Rᵀ diag(γ) W and b + β W, every norm γ = 1 and β = 0 (see
``streams.py`` for what a stream is, ``numerics/rotations.py`` for the matrices).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_linear, name_of
from ptq_onnx.equalization.linear_weights import bias_of, set_linear
from ptq_onnx.equalization.norm_readers import Uses
from ptq_onnx.equalization.stream_parts import Stream
from ptq_onnx.graph.formula import DOMAIN, constant, new_constant, unique_name

Double = NDArray[np.float64]


def turn(graph: ir.Graph, stream: Stream, rotation: Double) -> tuple[str, ...]:
    """Fold ``rotation`` [D, D], orthogonal, R·1 = 1, into all that writes to and reads a stream.

    Returns the names of the linears that were added for what cannot take it in.
    """
    factors = {norm: affine_of(norm) for norm in stream.norms}
    added = [
        _turn_back(graph, value, rotation, taken, None if norm is None else factors[norm],
                   kept=norm in stream.shifted)
        for value, (norm, taken) in stream.restored.items()
        if value not in stream.entered
    ]  # fmt: skip
    for uses in stream.entered.values():
        for value in dict.fromkeys(node.inputs[index] for node, index in uses):
            assert value is not None
            made = _linear(graph, value, rotation, np.zeros(len(rotation)), "turned")
            added.append(made)
            for node, index in uses:
                if node.inputs[index] is value:
                    node.replace_input_with(index, made.outputs[0])
    for linear, mul in stream.scaled:
        _take_factor_in(graph, linear, mul)
    for node in dict.fromkeys([*stream.writers, *(linear for linear, _ in stream.scaled)]):
        _turn_output(graph, node, rotation)
    for node, index, axis in stream.constants:
        array = _number(node, index)
        turned = np.moveaxis(_apply(np.moveaxis(array, axis, -1), rotation), -1, axis)
        value = node.inputs[index]
        assert value is not None
        new = new_constant(graph, f"{value.name}_turned", turned.astype(np.float32))
        node.replace_input_with(index, new)
    for reader, norm in stream.readers:
        scale, shift = (None, None) if norm is None else factors[norm]
        _turn_input(graph, reader, rotation, scale, None if norm in stream.shifted else shift)
    for norm in stream.norms:
        scale, shift = factors[norm]
        kept = np.zeros_like(shift)
        if norm in stream.shifted:
            kept = _apply(np.divide(shift, scale, out=kept, where=shift != 0), rotation)
        _make_plain(graph, norm, kept)
    return tuple(name_of(node) for node in added if node is not None)


def _turn_back(
    graph: ir.Graph,
    value: ir.Value,
    rotation: Double,
    taken: Uses,
    affine: tuple[Double, Double] | None,
    *,
    kept: bool,
) -> ir.Node:
    """A linear that gives what a turned tensor was, to all but the uses ``taken``."""
    shape = value.shape
    width = len(rotation) if shape is None else int(list(shape)[-1])  # type: ignore[arg-type]
    scale, shift = (np.ones(width), np.zeros(width)) if affine is None else affine
    weight = _apply(np.diag(scale), rotation).T
    others = [(u.node, u.idx) for u in value.uses() if (u.node, u.idx) not in taken]
    made = _linear(graph, value, weight, np.zeros(width) if kept else shift, "as_it_was")
    output = made.outputs[0]
    for node, index in others:
        node.replace_input_with(index, output)
    if value.is_graph_output():
        name, inner = value.name, output.name
        value.name, output.name = f"{inner}_before", name
        for place, old in enumerate(graph.outputs):
            if old is value:
                graph.outputs[place] = output
    return made


def _linear(graph: ir.Graph, value: ir.Value, weight: Double, bias: Double, suffix: str) -> ir.Node:
    """A new linear right behind what makes a tensor."""
    name = unique_name(graph, f"{value.name}_{suffix}")
    parts = [
        new_constant(graph, f"{name}_{part}", array.astype(np.float32))
        for part, array in (("weight", weight), ("bias", bias))
    ]
    node = ir.node("Linear", [value, *parts], domain=DOMAIN)
    node.name, output = f"{name}_node", node.outputs[0]
    output.name, output.type, output.shape = name, value.type, value.shape
    before = value.producer()
    assert before is not None
    node.metadata_props.update(before.metadata_props)
    graph.insert_after(before, node)
    return node


def _apply(rows: Double, rotation: Double) -> Double:
    """Rows [..., k D] times R in each of their k pieces."""
    pieces = rows.reshape(*rows.shape[:-1], -1, len(rotation))
    return np.asarray((pieces @ rotation).reshape(rows.shape), np.float64)


def _number(node: ir.Node, index: int) -> Double:
    array = constant(node.inputs[index])
    assert array is not None
    return array.astype(np.float64)


def affine_of(norm: ir.Node) -> tuple[Double, Double]:
    """γ and β of a norm, [D] each."""
    scale = _number(norm, 1).ravel()
    shift = _number(norm, 2).ravel() if len(norm.inputs) > 2 else np.zeros(len(scale))
    return scale, shift


def _make_plain(graph: ir.Graph, norm: ir.Node, shift: Double) -> None:
    """γ becomes 1 and β ``shift`` [D]."""
    for index, array in ((1, np.ones_like(shift)), (2, shift)):
        old = norm.inputs[index] if len(norm.inputs) > index else None
        if old is not None and old.shape is not None:
            shape = tuple(int(d) for d in old.shape if isinstance(d, int))
            number = array.reshape(shape).astype(np.float32)
            norm.replace_input_with(index, new_constant(graph, f"{old.name}_plain", number))


def _take_factor_in(graph: ir.Graph, linear: ir.Node, mul: ir.Node) -> None:
    """A factor per channel [D] behind a linear (LayerScale) into its weight."""
    output = linear.outputs[0]
    index = next(i for i, v in enumerate(mul.inputs) if v is not output)
    factor = _number(mul, index).ravel()
    weight = _number(linear, 1)
    set_linear(graph, linear, weight * factor, bias_of(linear, weight.shape[1]) * factor)
    mul.outputs[0].replace_all_uses_with(output)
    graph.remove(mul, safe=True)


def _turn_output(graph: ir.Graph, node: ir.Node, rotation: Double) -> None:
    weight = _number(node, 1)
    if is_linear(node):
        bias = bias_of(node, weight.shape[1])
        set_linear(graph, node, _apply(weight, rotation), _apply(bias, rotation))
        return
    bias = bias_of(node, len(weight))
    turned = np.moveaxis(_apply(np.moveaxis(weight, 0, -1), rotation), -1, 0)
    set_linear(graph, node, turned, _apply(bias, rotation))


def channels_last(reader: ir.Node) -> Double:
    """The weight of a linear or convolution, the channels that it reads as last axis."""
    return np.moveaxis(_number(reader, 1), _inside(reader), -1)


def _inside(reader: ir.Node) -> int:
    """The axis of a weight that is of the channels read."""
    return 1 if reader.op_type == "Conv" else 0


def _turn_input(
    graph: ir.Graph, reader: ir.Node, rotation: Double, scale: Double | None, shift: Double | None
) -> None:
    """A linear or convolution behind a norm with γ = ``scale`` and β = ``shift``."""
    rows = channels_last(reader)
    bias = bias_of(reader, _number(reader, 1).shape[1 - _inside(reader)])
    if shift is not None:
        bias = bias + (rows @ shift).reshape(len(rows), -1).sum(axis=1)
    if scale is not None:
        rows = rows * scale
    set_linear(graph, reader, np.moveaxis(_apply(rows, rotation), -1, _inside(reader)), bias)
