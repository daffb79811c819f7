"""Codes of weights that fit 4 bits, stored in 4: half the bytes, and the same numbers.

A Cast to int8 stands behind the initializer. ONNX Runtime folds it when a session is made, before
it fuses Q/DQ, so that the product gets the kernel it would have had, and all outputs are the same
to the bit. DequantizeLinear of int4 would not do: beside Q/DQ the product runs in float then
(5 times as slow), and beside a float activation as MatMulNBits, which rounds that to 8 bits
(measured, 1.31).

Codes that are multiples of few numbers in blocks of rows (``numerics/multiples.py``) are stored as
what is multiplied; these ops are folded too, to the same int8 codes.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.graph.codings import DEQUANTIZE
from ptq_onnx.numerics.multiples import ROWS, WIDEST, Blocks, blocks_of
from ptq_onnx.qdq.nodes import Behind, Nodes, remove_unused
from ptq_onnx.qdq.weights import ORDER

INT4 = (-8, 7)
"""What 4 bits hold."""
MIDDLE = 1 << 3
"""Codes from 0 to 15 lie so much lower in int4."""


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
            if codes.min(initial=0) >= INT4[0] and codes.max(initial=0) <= INT4[1]:
                narrow = nodes.constant(f"{held.name}_int4", codes.astype(ml_dtypes.int4))
                to = {"to": int(ir.DataType.INT8)}
                widened[held] = nodes.add(None, "Cast", [narrow], held, "int8", attributes=to)
            elif (blocks := _blocks(held)) is not None:
                widened[held] = _multiplied(nodes, held, *blocks)
            else:
                continue
        node.replace_input_with(0, widened[held])
    remove_unused(graph)
    return len(widened)


def _blocks(held: ir.Value) -> tuple[Blocks, NDArray[np.int64]] | None:
    """What makes codes in blocks, and the order of their rows; None where they are in none."""
    order = held.meta.get(ORDER)
    if order is None or held.const_value is None:
        return None
    found = blocks_of(held.const_value.numpy(), order, WIDEST)
    return None if found is None else (found, order)


def _multiplied(nodes: Nodes, held: ir.Value, blocks: Blocks, order: NDArray[np.int64]) -> ir.Value:
    """f (q - z) of blocks of rows, then the rows in their own order, before the first node.

    Names are short: there are many of them.
    """
    rows, columns = blocks.codes.shape
    short = ir.Value(name=nodes.unique("blocks"), type=held.type)
    behind, whole = Behind(nodes, short, None), np.dtype(np.int32)

    def wide(suffix: str, array: NDArray[Any]) -> ir.Value:
        return behind.cast(behind.constant(suffix, array), f"{suffix}_wide", whole)

    codes = (blocks.codes - MIDDLE).reshape(-1, ROWS, columns).astype(ml_dtypes.int4)
    places = np.argsort(order).astype(np.min_scalar_type(len(order)))
    value = wide("int4", codes)
    for op, other, suffix in (
        ("Sub", wide("zeros", (blocks.zero - MIDDLE)[:, None].astype(ml_dtypes.int4)), "less"),
        ("Mul", wide("factors", blocks.factor[:, None].astype(ml_dtypes.uint4)), "times"),
        ("Reshape", behind.constant("shape", np.array([rows, columns])), "rows"),
        ("Gather", wide("places", places), "ordered"),
    ):
        value = behind.op(op, [value, other], suffix, dtype=whole)
    made = behind.cast(value, "int8", np.dtype(np.int8))
    made.shape = held.shape
    return made
