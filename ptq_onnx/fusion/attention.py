"""AttentionScale: one scalar Mul behind the product of queries and keys.

Exporters scale q, or k, or both by √s, before or after their transposes, or the product.
All of it becomes ``MatMul(q, k) → Mul(s) → (mask) → Softmax``, the factor taken in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ptq_onnx.fusion.formula import constant, is_private, new_constant, scalar, sizes, unique_name

LAYOUT = frozenset(("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity"))
"""Ops that a scalar factor may pass."""


@dataclass(frozen=True)
class Scale:
    """A Mul or Div of ``data`` by one constant number."""

    node: ir.Node
    data: ir.Value
    factor: float


def fuse_attention_scale(model: ir.Model) -> int:
    """Move the scales of all attention products behind them; returns how many changed."""
    return sum(_gather_scales(model.graph, node) for node in list(model.graph))


def _gather_scales(graph: ir.Graph, product: ir.Node) -> bool:
    if product.op_type != "MatMul" or any(constant(v) is not None for v in product.inputs):
        return False
    if not _reaches_softmax(product.outputs[0]):
        return False
    before = [s for v in product.inputs if v is not None for s in _scales_behind(v)]
    after = _scale_after(product)
    if not before and (after is None or after.node.op_type == "Mul"):
        return False
    factor = float(np.prod([s.factor for s in (*before, *([after] if after else []))]))
    for scale in before:
        _bypass(graph, scale)
    _write_scale(graph, product, after, factor)
    return True


def _scales_behind(value: ir.Value) -> list[Scale]:
    """The scales on one branch, through layout ops, as far as nothing else reads it."""
    found: list[Scale] = []
    while is_private(value):
        node = value.producer()
        if node is None:
            break
        scale = _scale(node)
        if scale is not None:
            found.append(scale)
            value = scale.data
        elif node.op_type in LAYOUT and node.inputs[0] is not None:
            value = node.inputs[0]
        else:
            break
    return found


def _scale(node: ir.Node) -> Scale | None:
    """The node as a scale that keeps rank and type of its data; None for anything else."""
    if node.op_type not in ("Mul", "Div") or None in node.inputs:
        return None
    data, other = node.inputs
    if node.op_type == "Mul" and scalar(other) is None:
        data, other = other, data
    factor, array, dims = scalar(other), constant(other), sizes(data)
    if data is None or factor is None or array is None or dims is None or scalar(data) is not None:
        return None
    if array.dtype != np.float32 or array.ndim > len(dims):
        return None
    if node.op_type == "Div":
        factor = 1.0 / factor if factor else None
    return None if factor is None else Scale(node, data, factor)


def _scale_after(product: ir.Node) -> Scale | None:
    """The scale that alone reads the product."""
    if not is_private(product.outputs[0]):
        return None
    return _scale(next(iter(product.outputs[0].uses())).node)


def _reaches_softmax(value: ir.Value, depth: int = 6) -> bool:
    """True where the value ends in a Softmax, through scales, masks and layout ops."""
    for use in value.uses():
        if use.node.op_type == "Softmax":
            return True
        passes = use.node.op_type in LAYOUT | {"Mul", "Div", "Add", "Where", "Clip"}
        if depth and passes and _reaches_softmax(use.node.outputs[0], depth - 1):
            return True
    return False


def _bypass(graph: ir.Graph, scale: Scale) -> None:
    scale.node.outputs[0].replace_all_uses_with(scale.data)
    graph.remove(scale.node, safe=True)


def _write_scale(graph: ir.Graph, product: ir.Node, after: Scale | None, factor: float) -> None:
    """One Mul by ``factor`` behind the product; the scaled value has the name it had before."""
    output = product.outputs[0]
    scaled = output if after is None else after.node.outputs[0]
    name = f"{product.name or output.name}_scale" if after is None else after.node.name
    number = new_constant(graph, f"{scaled.name}_factor", np.array(factor, np.float32))
    mul = ir.node("Mul", [output, number], name=name)
    result = mul.outputs[0]
    result.type, result.shape = scaled.type, scaled.shape
    if after is None:
        mul.metadata_props.update(product.metadata_props)
        before = unique_name(graph, f"{output.name}_product")
        result.name, output.name = output.name, before
        output.replace_all_uses_with(result, replace_graph_outputs=True)
        mul.replace_input_with(0, output)
        graph.insert_after(product, mul)
    else:
        mul.metadata_props.update(after.node.metadata_props)
        result.name = scaled.name
        graph.insert_before(after.node, mul)
        scaled.replace_all_uses_with(result, replace_graph_outputs=True)
        graph.remove(after.node, safe=True)
