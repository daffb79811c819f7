"""Which output answers with classes, by the ops that make it.

A softmax over an embedding says nothing, and its shape is that of logits. What tells them apart
is the end of the graph: logits come out of a linear with a bias, or a softmax; features out of a
norm, a pooling, a tanh, a division by their length, or a projection without bias.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ptq_onnx.blocks.walking import is_constant
from ptq_onnx.errors import PtqError
from ptq_onnx.evaluation.network import may_be_classes

PASSED = frozenset(
    ("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Gather",
     "Slice", "ReduceMean", "GlobalAveragePool", "AveragePool", "DequantizeLinear",
     "QuantizeLinear", "Expand")
)  # fmt: skip
"""Ops through which classes stay classes."""
MAKERS = frozenset(
    ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "LpNormalization",
     "L2Normalization", "Tanh")
)  # fmt: skip
"""Ops whose results are features."""
FEATURES = ("embed", "feat", "pool", "hidden", "token", "latent", "descriptor", "project")
"""Words by which exporters name outputs that are no logits."""


def class_outputs(model: ir.Model) -> list[str]:
    """Outputs of floats that are [batch, classes] by their shape, or may be where it is unknown."""
    floats = (None, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
    return [
        str(v.name)
        for v in model.graph.outputs
        if v.dtype in floats and (v.shape is None or may_be_classes([_size(d) for d in v.shape]))
    ]


def logits_output(model: ir.Model) -> str | None:
    """The first of them that holds logits or probabilities by what makes it; None where none
    does."""
    named = set(class_outputs(model))
    for value in model.graph.outputs:
        name = str(value.name)
        if name in named and value.shape is not None and _is_head(value):
            return name if not any(word in name.lower() for word in FEATURES) else None
    return None


def feature_outputs(model: ir.Model) -> list[str]:
    """Those of them that certainly are features, so that no class leads: by their name, or made by
    a norm, a tanh or a division by their length."""
    named = set(class_outputs(model))
    return [
        str(v.name)
        for v in model.graph.outputs
        if str(v.name) in named
        and (any(word in str(v.name).lower() for word in FEATURES) or _is_feature(v))
    ]


def features_of(path: str | Path, size: tuple[int, int] | None = None) -> list[str]:
    """:func:`feature_outputs` of a file; none where it cannot be prepared."""
    from ptq_onnx.preparation.prepare import prepare

    try:
        return feature_outputs(prepare(path, size=size).model)
    except PtqError:
        return []


def _is_feature(value: ir.Value) -> bool:
    node = value.producer()
    if node is None:
        return False
    made = [v for v in node.inputs if v is not None and not is_constant(v)]
    if node.op_type in MAKERS or (node.op_type == "Div" and len(made) == 2):
        return True
    if node.op_type in PASSED or (node.op_type in ("Mul", "Div", "Concat") and made):
        return all(_is_feature(v) for v in (made[:1] if node.op_type in PASSED else made))
    return False


def _size(dim: int | ir.SymbolicDim) -> int | str:
    return dim if isinstance(dim, int) else str(dim.value)


def _is_head(value: ir.Value) -> bool:
    node = value.producer()
    if node is None:
        return False
    inputs = [v for v in node.inputs if v is not None]
    if node.op_type in ("Softmax", "LogSoftmax"):
        return True
    if node.op_type in PASSED:
        return _is_head(inputs[0])
    if node.op_type in ("Linear", "Gemm", "Conv"):
        return len(inputs) > 2
    if node.op_type in ("Mul", "Div", "Add", "Sub", "Mean", "Sum"):
        made = [v for v in inputs if not is_constant(v)]
        if node.op_type in ("Add", "Sub") and len(made) == 1 and _is_product(made[0]):
            return True  # a bias that was not fused
        return bool(made) and all(_is_head(v) for v in made)
    return False


def _is_product(value: ir.Value) -> bool:
    node = value.producer()
    if node is None or node.op_type not in ("MatMul", "Gemm", "Linear"):
        return False
    return any(v is not None and is_constant(v) for v in node.inputs[1:2])


def float_outputs(model: ir.Model) -> tuple[str, ...]:
    """The model's outputs that hold floats, each once."""
    kinds = (None, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
    made = [v for v in model.graph.outputs if v.dtype in kinds and v.producer() is not None]
    return tuple(dict.fromkeys(str(v.name) for v in made))
