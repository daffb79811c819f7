"""Which additions to the attention logits shut positions out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_layout, source

SHUT_OUT = -50.0
"""What is added to logits from here down is a mask: exp(-50) is nothing beside 1."""


def tiled_constant(value: ir.Value) -> NDArray[np.generic] | None:
    """The array of a constant, also where layout ops spread it over a batch."""
    node = value.producer()
    while node is not None and is_layout(node) and node.inputs and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return None if value.const_value is None else value.const_value.numpy()


def is_mask(node: ir.Node) -> bool:
    """True for an Add of numbers that shut positions out (some far below zero)."""
    for value in node.inputs:
        array = None if value is None else tiled_constant(value)
        if array is not None and array.dtype.kind == "f":
            return bool(array.size and array.min() <= SHUT_OUT)
        maker = None if value is None else source(value)
        if maker is not None and maker.op_type == "Where":
            return True
    return False
