"""The two ops between real values and codes."""

from __future__ import annotations

import onnx_ir as ir

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
DYNAMIC = "DynamicQuantizeLinear"
"""Makes codes, with scale and zero point, of floats whose range it finds itself."""
CODINGS = frozenset((QUANTIZE, DEQUANTIZE))


def is_coding(node: ir.Node) -> bool:
    """True for QuantizeLinear and DequantizeLinear."""
    return node.op_type in CODINGS
