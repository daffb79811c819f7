"""Turns a residual stream by an orthogonal matrix, equal in float and free at run time.

Every writer gets W R, every reader Rᵀ diag(γ) W and b + β W, every norm γ = 1 and β = 0 (see
``streams.py`` for what a stream is, ``numerics/rotations.py`` for the matrices).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.equalization.linear_weights import bias_of, set_linear
from ptq_onnx.equalization.streams import Stream
from ptq_onnx.graph.formula import constant, new_constant

Double = NDArray[np.float64]


def turn(graph: ir.Graph, stream: Stream, rotation: Double) -> None:
    """Fold ``rotation`` [D, D], orthogonal, R·1 = 1, into all that writes to and reads a stream."""
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
    factors = {norm: _affine(norm) for norm in stream.norms}
    for linear, norm in stream.readers:
        _turn_input(graph, linear, rotation, None if norm is None else factors[norm])
    for norm in stream.norms:
        _make_plain(graph, norm)


def _apply(rows: Double, rotation: Double) -> Double:
    """Rows [..., k D] times R in each of their k pieces."""
    pieces = rows.reshape(*rows.shape[:-1], -1, len(rotation))
    return np.asarray((pieces @ rotation).reshape(rows.shape), np.float64)


def _number(node: ir.Node, index: int) -> Double:
    array = constant(node.inputs[index])
    assert array is not None
    return array.astype(np.float64)


def _affine(norm: ir.Node) -> tuple[Double, Double]:
    """γ and β of a norm, [D] each."""
    scale = _number(norm, 1).ravel()
    shift = _number(norm, 2).ravel() if len(norm.inputs) > 2 else np.zeros(len(scale))
    return scale, shift


def _make_plain(graph: ir.Graph, norm: ir.Node) -> None:
    for index, number in ((1, 1.0), (2, 0.0)):
        old = norm.inputs[index] if len(norm.inputs) > index else None
        if old is not None and old.shape is not None:
            shape = tuple(int(d) for d in old.shape if isinstance(d, int))
            new = new_constant(graph, f"{old.name}_plain", np.full(shape, number, np.float32))
            norm.replace_input_with(index, new)


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


def _turn_input(
    graph: ir.Graph, linear: ir.Node, rotation: Double, affine: tuple[Double, Double] | None
) -> None:
    weight = _number(linear, 1)
    bias = bias_of(linear, weight.shape[1])
    if affine is not None:
        scale, shift = affine
        weight, bias = weight * scale[:, None], bias + shift @ weight
    set_linear(graph, linear, _apply(weight.T, rotation).T, bias)
