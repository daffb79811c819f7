"""Codes of weights that fit 4 bits, stored in 4: half the bytes, and the same numbers.

A Cast to int8 stands behind the initializer. ONNX Runtime folds it when a session is made, before
it fuses Q/DQ, so that the product gets the kernel it would have had, and all outputs are the same
to the bit. DequantizeLinear of int4 would not do: beside Q/DQ the product runs in float then
(5 times as slow), and beside a float activation as MatMulNBits, which rounds that to 8 bits
(measured, 1.31).
"""

from __future__ import annotations

import ml_dtypes
import onnx_ir as ir

from ptq_onnx.graph.codings import DEQUANTIZE
from ptq_onnx.qdq.nodes import Nodes, remove_unused

INT4 = (-8, 7)
"""What 4 bits hold."""


def store_in_four_bits(model: ir.Model) -> int:
    """Store every weight in 4 bits whose int8 codes need no more, in place; how many there were."""
    graph = model.graph
    values = (v for node in graph for v in node.outputs)
    names = {str(v.name) for v in (*graph.inputs, *graph.initializers.values(), *values)}
    nodes, widened = Nodes(graph, names=names), dict[ir.Value, ir.Value]()
    for node in [n for n in graph if n.op_type == DEQUANTIZE]:
        held = node.inputs[0]
        if held is None or held.const_value is None or held.dtype != ir.DataType.INT8:
            continue
        if held not in widened:
            codes = held.const_value.numpy()
            if codes.min(initial=0) < INT4[0] or codes.max(initial=0) > INT4[1]:
                continue
            narrow = nodes.constant(f"{held.name}_int4", codes.astype(ml_dtypes.int4))
            to = {"to": int(ir.DataType.INT8)}
            widened[held] = nodes.add(None, "Cast", [narrow], held, "int8", attributes=to)
        node.replace_input_with(0, widened[held])
    remove_unused(graph)
    return len(widened)
