"""The one form of attention: q·k → · s → + bias → + mask → Softmax → map·v.

Exporters scale q, or k, or both by √s, before or after their transposes, or the product; all of it
becomes one Mul, the factor taken in float64. Values that stand before the map (v · Aᵀ) go behind
it. One constant that holds a bias table and a mask is added as two, for the table is quantized
and the mask is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.masks import SHUT_OUT
from ptq_onnx.graph.formula import constant, is_private, new_constant, scalar, sizes, unique_name

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
    if not reaches_softmax(product.outputs[0]):
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


def reaches_softmax(value: ir.Value, depth: int = 6) -> bool:
    """True where the value ends in a Softmax, through scales, masks and layout ops."""
    for use in value.uses():
        if use.node.op_type == "Softmax":
            return True
        passes = use.node.op_type in LAYOUT | {"Mul", "Div", "Add", "Where", "Clip"}
        if use.node.op_type in ("MatMul", "Conv") and use.idx == 0:
            passes = constant(use.node.inputs[1]) is not None  # heads are mixed
        if depth and passes and reaches_softmax(use.node.outputs[0], depth - 1):
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


# --- order ----------------------------------------------------------------------------------


def fuse_attention_order(model: ir.Model) -> int:
    """Turn v · Aᵀ into (A · vᵀ)ᵀ; returns how many products changed."""
    return sum(_turn(model.graph, node) for node in list(model.graph))


def _turn(graph: ir.Graph, product: ir.Node) -> bool:
    if product.op_type != "MatMul" or any(constant(v) is not None for v in product.inputs):
        return False
    values, attention = product.inputs
    output, dims = product.outputs[0], sizes(product.outputs[0])
    if values is None or attention is None or dims is None or _is_map(values):
        return False
    swap = attention.producer()
    if not _is_map(attention) or swap is None:
        return False
    rank = len(dims)
    if any(d is None or len(d) != rank for d in (sizes(values), sizes(attention))):
        return False
    perm = [*range(rank - 2), rank - 1, rank - 2]
    plain = swap.inputs[0] if _is_swap(swap, perm) else None
    name = product.name or output.name
    new: list[ir.Node] = []
    if plain is None:
        new.append(ir.node("Transpose", [attention], {"perm": perm}, name=f"{name}_map"))
        plain = new[-1].outputs[0]
    maker = values.producer()
    if maker is not None and _is_swap(maker, perm) and maker.inputs[0] is not None:
        turned = maker.inputs[0]
    else:
        new.append(ir.node("Transpose", [values], {"perm": perm}, name=f"{name}_values"))
        turned = new[-1].outputs[0]
    new.append(ir.node("MatMul", [plain, turned], name=f"{name}_turned"))
    new.append(ir.node("Transpose", [new[-1].outputs[0]], {"perm": perm}, name=product.name))
    for node in new:
        node.metadata_props.update(product.metadata_props)
        value = node.outputs[0]
        value.name = unique_name(graph, f"{node.name}_output")
        value.type = output.type
        read = sizes(node.inputs[0]) if node.op_type == "Transpose" else None
        order = dims if read is None else read
        value.shape = ir.Shape([order[i] for i in perm])
    result = new[-1].outputs[0]
    result.name, result.shape = output.name, output.shape
    graph.insert_before(product, new)
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(product, safe=True)
    return True


def _is_swap(node: ir.Node, perm: list[int]) -> bool:
    """True for a Transpose of the last two axes."""
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", ())) == perm


def _is_map(value: ir.Value) -> bool:
    """True for a softmax, transposed or not."""
    node = value.producer()
    while node is not None and node.op_type in ("Transpose", "Identity"):
        before = node.inputs[0]
        node = None if before is None else before.producer()
    return node is not None and node.op_type == "Softmax"


# --- masks ----------------------------------------------------------------------------------


def split_mask(model: ir.Model) -> int:
    """Add bias and mask of one constant one after the other; returns how many were split."""
    graph = model.graph
    return sum(_take_apart(graph, node) or _split_mask(graph, node) for node in list(graph))


def _take_apart(graph: ir.Graph, add: ir.Node) -> bool:
    """logits + (mask + table), the mask tiled over the batch: (logits + table) + mask."""
    if add.op_type != "Add" or None in add.inputs or not reaches_softmax(add.outputs[0]):
        return False
    for data, other in (tuple(add.inputs), tuple(reversed(add.inputs))):
        inner = None if other is None else other.producer()
        if data is None or other is None or inner is None or inner.op_type != "Add":
            continue
        table = next((v for v in inner.inputs if constant(v) is not None), None)
        mask = next((v for v in inner.inputs if v is not table), None)
        if not is_private(other) or table is None or mask is None or not _is_tiled(mask):
            continue
        output = add.outputs[0]
        biased = ir.node("Add", [data, table], name=f"{add.name or output.name}_bias")
        value = biased.outputs[0]
        value.name = unique_name(graph, f"{output.name}_biased")
        value.type, value.shape = output.type, output.shape
        biased.metadata_props.update(add.metadata_props)
        graph.insert_before(add, biased)
        add.replace_input_with(0, value)
        add.replace_input_with(1, mask)
        graph.remove(inner, safe=True)
        return True
    return False


def _is_tiled(value: ir.Value) -> bool:
    """True for a constant that layout ops have tiled."""
    node = value.producer()
    while node is not None and node.op_type in LAYOUT | {"Expand", "Tile"}:
        before = node.inputs[0]
        if constant(before) is not None:
            return True
        node = None if before is None else before.producer()
    return False


def _split_mask(graph: ir.Graph, add: ir.Node) -> bool:
    if add.op_type != "Add" or None in add.inputs or not reaches_softmax(add.outputs[0]):
        return False
    data, other = add.inputs
    found = constant(other)
    if found is None:
        data, other = other, data
        found = constant(other)
    if data is None or other is None or found is None or found.dtype != np.float32:
        return False
    array = np.asarray(found, np.float32)
    shut = array <= SHUT_OUT
    if not shut.any() or shut.all() or not np.any(array[~shut]):
        return False
    depth = _mask_depth(np.asarray(array[shut], np.float64))
    table = np.where(shut, 0 if np.isinf(depth) or depth < -1e4 else array - depth, array)
    mask = np.where(shut, depth, 0).astype(np.float32)
    table = np.asarray(table, np.float32)
    if np.abs(table).max() > -SHUT_OUT:
        return False
    output = add.outputs[0]
    first = new_constant(graph, f"{other.name}_bias", _fold_batch(table))
    second = new_constant(graph, f"{other.name}_mask", _fold_heads(mask))
    biased = ir.node("Add", [data, first], name=f"{add.name or output.name}_bias")
    value = biased.outputs[0]
    value.name = unique_name(graph, f"{output.name}_biased")
    value.type, value.shape = output.type, output.shape
    biased.metadata_props.update(add.metadata_props)
    graph.insert_before(add, biased)
    add.replace_input_with(0, value)
    add.replace_input_with(1, second)
    return True


def _mask_depth(numbers: NDArray[np.float64]) -> float:
    """The number that a mask adds, from what is left of it behind a bias."""
    middle = float(np.median(numbers))
    if np.isinf(middle) or middle < -1e4:
        return float(numbers.max())
    return -100.0 * max(round(-middle / 100.0), 1)


def _fold_batch(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """A table that is the same for all windows: once."""
    return table[:1] if table.ndim == 4 and np.array_equal(table[:1] + 0 * table, table) else table


def _fold_heads(mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """A mask that is the same for all heads: once."""
    with np.errstate(invalid="ignore"):
        same = mask.ndim == 4 and all(
            np.array_equal(mask[:, :1], mask[:, h : h + 1]) for h in range(mask.shape[1])
        )
    return mask[:, :1] if same else mask
