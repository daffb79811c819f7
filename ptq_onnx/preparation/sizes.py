"""How many bytes a model takes, and from where on it is handled otherwise."""

from __future__ import annotations

import onnx_ir as ir

EXTERNAL_LIMIT = 1_900_000_000
"""Bytes from which weights go to a file of their own; a protobuf ends at 2 GiB."""

SHARED_LIMIT = 64_000_000
"""Bytes from which no protobuf of all weights is made to check, run or write a model."""


def serialized_size(model: ir.Model) -> int:
    """Bytes of all initializers."""
    tensors = (v.const_value for v in model.graph.initializers.values())
    return sum(t.nbytes for t in tensors if t is not None)
