"""The two ops between real values and codes."""

from __future__ import annotations

import onnx_ir as ir

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
CODINGS = frozenset((QUANTIZE, DEQUANTIZE))


def is_coding(node: ir.Node) -> bool:
    """True for QuantizeLinear and DequantizeLinear."""
    return node.op_type in CODINGS
