"""Second factors of products, turned behind their codes and not in front of them.

OpenVINO's products read k turned or not, and its Transpose costs nothing where it moves whole rows,
as those do that bring the heads forward. One that turns the rows into columns in front of Q is run
element by element: a thirtieth of the time of a ViT-S/16 (2026.4, one core with VNNI). So such a
Transpose is taken apart: what moves rows stays in front of Q, and the last two axes are swapped
between DQ and the product. The outputs are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import onnx_ir as ir

from ptq_onnx.blocks.walking import is_product
from ptq_onnx.graph.formula import is_private, unique_name
from ptq_onnx.qdq.kernel_forms import own_pair

T = TypeVar("T")
CODES = "_quantized"
"""Behind a tensor's name: its codes. Those of its rows, here, are ``…_rows_quantized``."""


def turn_behind_codes(model: ir.Model) -> ir.Model:
    """The lowered model itself, changed in place."""
    for node in list(model.graph):
        if is_product(node):
            _turn_second_factor(model.graph, node)
    return model


def _turn_second_factor(graph: ir.Graph, product: ir.Node) -> None:
    """Swap the last two axes of a product's second factor behind its DQ, where a Transpose in front
    of Q swaps them."""
    pair = own_pair(product)
    if pair is None:
        return
    quantize, dequantize = pair
    turned, values = quantize.inputs[0], dequantize.outputs[0]
    turn = None if turned is None else turned.producer()
    if turned is None or turn is None or turn.op_type != "Transpose" or not is_private(turned):
        return
    axes = turn.attributes.get_ints("perm", ())
    rows = _swapped(axes)
    if len(axes) < 2 or rows[-1] != len(axes) - 1:
        return
    swap, name = _swapped(range(len(axes))), values.name
    last = ir.node("Transpose", [values], {"perm": swap}, name=f"{name}_turned", num_outputs=1)
    made = last.outputs[0]
    made.shape, made.type = values.shape, values.type
    values.replace_all_uses_with(made)
    last.replace_input_with(0, values)
    graph.insert_after(dequantize, last)
    values.name = unique_name(graph, f"{name}_rows")
    made.name = name
    if rows == sorted(rows):
        quantize.replace_input_with(0, turn.inputs[0])
        graph.remove(turn, safe=True)
    else:
        turn.attributes["perm"] = ir.AttrInt64s("perm", rows)
        turned.name = unique_name(graph, f"{turned.name}_rows")
        _swap_shape(turned)
    codes = quantize.outputs[0]
    codes.name = unique_name(graph, f"{str(codes.name).removesuffix(CODES)}_rows{CODES}")
    for value in (codes, values):
        _swap_shape(value)


def _swap_shape(value: ir.Value) -> None:
    """Let the last two sizes change places."""
    if value.shape is not None:
        value.shape = ir.Shape(_swapped(list(value.shape)))


def _swapped(items: Sequence[T]) -> list[T]:
    """The same, the last two having changed places."""
    return [*items[:-2], *items[:-3:-1]]
