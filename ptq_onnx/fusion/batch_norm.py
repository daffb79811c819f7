"""BatchNormalization behind a linear goes into its weight and bias (LeViT's linears).

The channels of a BatchNormalization are axis 1; a Reshape or Flatten to [N, C] in front of it is
passed.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ptq_onnx.graph.formula import constant, is_private, new_constant, sizes


def fuse_linear_batch_norm(model: ir.Model) -> int:
    """Fold all that can be; returns how many."""
    return sum(_fold(model.graph, node) for node in list(model.graph))


def _fold(graph: ir.Graph, norm: ir.Node) -> bool:
    if norm.op_type != "BatchNormalization" or len(norm.outputs) != 1:
        return False
    data = norm.inputs[0]
    dims = sizes(data)
    if data is None or dims is None or len(dims) != 2:
        return False
    linear = _linear_behind(data, dims[1])
    arrays = [constant(v) for v in norm.inputs[1:]]
    if linear is None or any(a is None for a in arrays):
        return False
    gamma, beta, mean, variance = (np.asarray(a, np.float64) for a in arrays)
    weight, old = constant(linear.inputs[1]), linear.inputs[1]
    bias = constant(linear.inputs[2]) if len(linear.inputs) > 2 else np.zeros(len(gamma))
    if weight is None or old is None or bias is None or len(gamma) != weight.shape[1]:
        return False
    factor = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    scaled = (np.asarray(weight, np.float64) * factor).astype(np.float32)
    shifted = ((np.asarray(bias, np.float64) - mean) * factor + beta).astype(np.float32)
    inputs = [
        linear.inputs[0],
        new_constant(graph, f"{old.name}_normed", scaled),
        new_constant(graph, f"{old.name}_normed_bias", shifted),
    ]
    new = ir.node("Linear", inputs, domain=linear.domain, name=linear.name)
    output, before = new.outputs[0], linear.outputs[0]
    output.name, output.type, output.shape = before.name, before.type, before.shape
    new.metadata_props.update(linear.metadata_props)
    graph.insert_before(linear, new)
    before.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(linear, safe=True)
    norm.outputs[0].replace_all_uses_with(norm.inputs[0] or output, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    return True


def _linear_behind(value: ir.Value, channels: int | str) -> ir.Node | None:
    """The linear that alone makes the value, through reshapes that keep the last axis."""
    while is_private(value):
        node, dims = value.producer(), sizes(value)
        if node is None or dims is None or dims[-1] != channels:
            return None
        if node.op_type == "Linear":
            return node
        if node.op_type not in ("Reshape", "Flatten") or node.inputs[0] is None:
            return None
        value = node.inputs[0]
    return None
