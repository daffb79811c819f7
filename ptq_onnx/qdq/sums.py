"""Sums that are scaled afterwards, as means: Σx · c = mean(x) · (c·n).

The sum of n numbers may leave the range of 16 bits (65504) where none of them does, and c may be
too small for it; their mean stays as large as they are.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.walking import consumers
from ptq_onnx.graph.formula import constant, is_private, new_constant


def sums_to_means(graph: ir.Graph) -> int:
    """Rewrite every ReduceSum that nothing reads but a Mul by a constant; how many there were."""
    count = 0
    for node in [n for n in graph if n.op_type == "ReduceSum" and n.domain == ""]:
        output, size = node.outputs[0], _summed(node)
        readers = list(consumers(output))
        if size is None or not is_private(output) or readers[0][0].op_type != "Mul":
            continue
        product, index = readers[0]
        factor = constant(product.inputs[1 - index])
        if factor is None:
            continue
        mean = ir.node("ReduceMean", list(node.inputs), name=node.name, num_outputs=1)
        mean.attributes.update({a.name: a for a in node.attributes.values()})
        mean.metadata_props.update(node.metadata_props)
        result = mean.outputs[0]
        result.name, result.type, result.shape = output.name, output.type, output.shape
        graph.insert_after(node, mean)
        product.replace_input_with(index, result)
        scaled = np.asarray(np.asarray(factor, np.float32) * np.float32(size), np.float32)
        name = f"{output.name}_mean_factor"
        product.replace_input_with(1 - index, new_constant(graph, name, scaled))
        graph.remove(node, safe=True)
        count += 1
    return count


def _summed(node: ir.Node) -> int | None:
    """How many numbers make one sum; None where axes or sizes are not known."""
    data = node.inputs[0]
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if data is None or data.shape is None or axes is None or axes.size == 0:
        return None
    sizes = [data.shape[int(axis)] for axis in np.asarray(axes, np.int64).ravel()]
    known = [size for size in sizes if isinstance(size, int)]
    return math.prod(known) if len(known) == len(sizes) else None
