"""Equal graphs that a runtime computes faster in integers; nothing here depends on data.

* a patch embedding as Reshape → Transpose → Linear: ONNX Runtime leaves a Conv without a
  quantized output in float, a matrix product it does not;
* a packed projection of one pixel as Transpose → Linear → Transpose: the parts are quantized
  apart, so that the Conv has no quantized output either;
* q, k and v as linears of their own: the packed result would be transposed and split as floats;
* the scale of QKᵀ in the weights of q;
* a linear on [batch, C] as one on [batch, 1, C]: ONNX Runtime makes a float Gemm of the other;
* a convolution's padding as a Pad, where its input is to be shifted.

Each function returns how often it fired, leaves alone what it does not recognise, and does
nothing on a second run. Weights are new initializers; the old ones are left as they are.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.element_map import layout_indices
from ptq_onnx.blocks.walking import is_linear, is_product, name_of, source, through_layout
from ptq_onnx.equalization.linear_weights import own_columns, scale_columns
from ptq_onnx.equalization.writer import Writer, drop_unread
from ptq_onnx.graph.formula import constant, new_constant, scalar

Array = NDArray[np.float32]
QUERY_COLUMNS = "query_columns"


def fold_attention_scales(model: ir.Model) -> int:
    """Move the scalar behind QKᵀ into the weights of q; returns how many."""
    return sum(_fold_scale(model.graph, node) for node in list(model.graph))


def _fold_scale(graph: ir.Graph, mul: ir.Node) -> bool:
    if mul.op_type != "Mul" or None in mul.inputs:
        return False
    data, number = mul.inputs
    factor = scalar(number)
    product = None if data is None else data.producer()
    if not factor or product is None or data is None or not is_product(product):
        return False
    if len(data.uses()) != 1 or data.is_graph_output():
        return False
    query = product.inputs[0]
    linear = None if query is None else source(query)
    if query is None or linear is None or not is_linear(linear):
        return False
    columns = own_columns(linear, query)
    if columns is None:
        return False
    scale_columns(graph, linear, columns, np.float64(1 / factor))
    output = mul.outputs[0]
    data.shape, data.type = output.shape, output.type
    name = output.name
    output.replace_all_uses_with(data, replace_graph_outputs=True)
    graph.remove(mul, safe=True)
    data.name = name
    return True


def unpack_attention(model: ir.Model) -> int:
    """Split packed q, k, v linears into one linear each; returns how many were packed."""
    return sum(_unpack(model.graph, n) for n in list(model.graph) if is_linear(n))


def _unpack(graph: ir.Graph, linear: ir.Node) -> bool:
    output, weight = linear.outputs[0], constant(linear.inputs[1])
    leaves = list(through_layout(output))
    if weight is None or output.is_graph_output() or len(leaves) < 2:
        return False
    if output.shape is None or len(output.shape) != 3 or not isinstance(output.shape[1], int):
        return False
    reads: list[ir.Value] = []
    for node, index in leaves:
        value = node.inputs[index]
        if not is_product(node) or value is None:
            return False
        if all(value is not other for other in reads):
            reads.append(value)
    plans = [_part(output, value) for value in reads]
    if len(reads) < 2 or any(plan is None for plan in plans):
        return False
    bias = constant(linear.inputs[2]) if len(linear.inputs) > 2 else None
    batch, tokens = output.shape[0], int(output.shape[1])
    for number, (value, plan) in enumerate(zip(reads, plans, strict=True)):
        assert plan is not None
        columns, order = plan
        heads, width = columns.shape
        write = Writer(graph, linear)
        flat = columns.ravel()
        name = str(linear.inputs[1].name)  # type: ignore[union-attr]
        data = linear.inputs[0]
        assert data is not None
        part = np.ascontiguousarray(weight[:, flat])
        inputs = [data, new_constant(graph, f"{name}_{number}", part)]
        if bias is not None:
            inputs.append(new_constant(graph, f"{name}_bias_{number}", bias[flat]))
        shape = [batch, tokens, heads * width]
        made = write.node("Linear", inputs, list(shape), output, f"part{number}", "ptq_onnx")
        split = [tokens, heads, width]
        apart = write.reshape(made, [0, *split], [batch, *split], "heads")
        dims = [batch, *split]
        turned = write.node(
            "Transpose", [apart], [dims[a] for a in order], value, "turned", perm=order
        )
        old = value.name
        value.replace_all_uses_with(turned, replace_graph_outputs=True)
        value.name = f"{old}_packed"
        turned.name = old
    drop_unread(graph, linear)
    return True


def _part(
    output: ir.Value, value: ir.Value
) -> tuple[NDArray[np.int64], tuple[int, int, int, int]] | None:
    """Columns [heads, width] of a packed output in ``value``, and its order of axes.

    ``value`` must be [batch, heads, tokens, width] or [batch, heads, width, tokens].
    """
    if value.shape is None or len(value.shape) != 4 or output.shape is None:
        return None
    indices = layout_indices(output, value)
    if indices is None or indices.shape[0] != 1:
        return None
    tokens, columns = int(output.shape[1]), int(output.shape[2])  # type: ignore[arg-type]
    for order in ((0, 2, 1, 3), (0, 2, 3, 1)):
        # As [heads, tokens, width], whichever way round the last two are.
        found = indices[0] if order[2] == 1 else indices[0].transpose(0, 2, 1)
        if found.shape[1] != tokens:
            continue
        part = found[:, 0] % columns
        expected = np.arange(tokens)[None, :, None] * columns + part[:, None]
        if np.array_equal(found, expected):
            return part, order
    return None


def keep_rank(model: ir.Model) -> int:
    """Write linears on [batch, C] with an axis of one token; returns how many."""
    return sum(_keep_rank(model.graph, n) for n in list(model.graph) if is_linear(n))


def _keep_rank(graph: ir.Graph, linear: ir.Node) -> bool:
    data, output = linear.inputs[0], linear.outputs[0]
    if data is None or data.shape is None or len(data.shape) != 2 or output.shape is None:
        return False
    write = Writer(graph, linear)
    axes = new_constant(graph, f"{data.name}_token_axis", np.array([1], np.int64))
    batch, width = data.shape
    token = write.node("Unsqueeze", [data, axes], [batch, 1, width], data, "token")
    linear.replace_input_with(0, token)
    flat = ir.node("Squeeze", [output, axes], name=f"{name_of(linear)}_flat")
    result = flat.outputs[0]
    result.type, result.shape = output.type, output.shape
    name = str(output.name)
    output.shape = ir.Shape([output.shape[0], 1, output.shape[1]])
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    flat.replace_input_with(0, output)
    output.name, result.name = f"{name}_token", name
    graph.insert_after(linear, flat)
    return True
