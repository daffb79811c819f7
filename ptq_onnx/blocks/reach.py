"""Tensors that reach much further above zero than below, by the ops that make them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ptq_onnx.graph.formula import constant

UPWARDS = frozenset(
    ("Gelu", "QuickGelu", "Silu", "HardSwish", "Relu", "Sigmoid", "HardSigmoid", "Softplus")
)
"""Activation functions whose values end just below zero, or there."""
MOST_OPS = 8


def reaches_up(value: ir.Value, ops: int = MOST_OPS) -> bool:
    """Whether an activation function of those makes it, times positive constants. At most so many
    ``ops`` are followed."""
    node = value.producer()
    if node is None or not ops:
        return False
    if node.op_type in UPWARDS:
        return True
    first = node.inputs[0] if node.inputs else None
    if node.op_type == "Identity" and first is not None:
        return reaches_up(first, ops - 1)
    if node.op_type != "Mul":
        return False
    for data, other in (node.inputs[:2], node.inputs[1::-1]):
        factor = None if other is None else constant(other)
        if data is not None and factor is not None:
            return bool(np.all(np.asarray(factor, np.float64) > 0)) and reaches_up(data, ops - 1)
    return False
