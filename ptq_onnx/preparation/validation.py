"""What a model must be to be quantized: known ops, inputs of numbers, finite weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from ptq_onnx.errors import ModelError, one_line
from ptq_onnx.graph.branches import CANNOT_BRANCH, LOOPS
from ptq_onnx.graph.onnxruntime_ops import TIED

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
NUMBERS = (
    *FLOATS, ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16,
    ir.DataType.UINT16, ir.DataType.INT32, ir.DataType.UINT32, ir.DataType.INT64,
    ir.DataType.UINT64,
)  # fmt: skip
"""What an input may hold."""
RUNTIME_DOMAIN = "com.microsoft"

LARGEST_BATCH = 1 << 28
"""Numbers of a batch whose size is fixed: a gigabyte."""

MASK_OPS = frozenset(
    (
        "Add",
        "Where",
        "Identity",
        "Cast",
        "Reshape",
        "Transpose",
        "Expand",
        "Unsqueeze",
        "Squeeze",
        "Slice",
        "Gather",
        "Concat",
    )
)
"""Ops on the way from a mask constant to its softmax."""


def validate(model: ir.Model, path: Path) -> None:
    """Raise :class:`ModelError` with the first thing that stands against quantization."""
    refuse_unknown(model, f"Model {path}: ")
    if any(node.domain == RUNTIME_DOMAIN for node in model.graph):
        _check_runtime(path)
    check_input(model, path)
    _check_outputs(model.graph, path)
    _check_weights(model.graph, path)


def refuse_unknown(model: ir.Model, prefix: str = "") -> None:
    """No loop, and no op that only a plug-in knows; what a branch holds is looked at once it is
    known which is taken."""
    local = {(f.domain, f.name) for f in model.functions.values()}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        odd = next((a for a in node.attributes.values() if a.is_ref()), None)
        if odd is not None:
            raise ModelError(
                f"{prefix}{'n' if prefix else 'N'}ode '{node.name or node.outputs[0].name}': its"
                f" attribute {odd.name} refers to one of a function, and the node is in none."
            )
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for node in (node for graph in graphs for node in graph):
        where = f"{prefix}{'n' if prefix else 'N'}ode '{node.name or node.outputs[0].name}'"
        if node.domain == "" and node.op_type in LOOPS:
            raise ModelError(
                f"{where}: {node.op_type} is control flow, which cannot be quantized."
                f" {CANNOT_BRANCH}"
            )
        known = node.domain in ("", RUNTIME_DOMAIN, *TIED) or (node.domain, node.op_type) in local
        if not known:
            raise ModelError(
                f"{where}: op {node.op_type} of the domain '{node.domain}' is unknown."
                " Export the model with standard ONNX ops only."
            )


def _check_runtime(path: Path) -> None:
    """ONNX Runtime must load a model that uses its own ops."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(
            f"Model {path}: ONNX Runtime cannot load its {RUNTIME_DOMAIN} ops: {one_line(error)}."
        ) from error


def check_input(model: ir.Model, path: Path) -> None:
    """Inputs of numbers, [batch, …]. Raises ModelError, true for what the file takes."""
    inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    if not inputs:
        raise ModelError(f"Model {path}: it has no input; nothing in it depends on an image.")
    for value in inputs:
        sides = [d for d in value.shape or () if isinstance(d, int)]
        if value.dtype not in NUMBERS or value.shape is None or not len(value.shape):
            what = "is no tensor [batch, …] of numbers"
        elif min(sides, default=1) < 1:
            what = "holds no image"
        elif math.prod(sides) > LARGEST_BATCH:
            what = f"holds more than {LARGEST_BATCH} numbers"
        else:
            continue
        raise ModelError(
            f"Model {path}: its input is '{value.name}' {_describe(value)}, which {what}:"
            " export it with the size of the images, and a dynamic batch."
        )


def _check_outputs(graph: ir.Graph, path: Path) -> None:
    """Every output is made by a node."""
    for value in graph.outputs:
        if value.producer() is None:
            what = "a weight" if value.name in graph.initializers else "the input itself"
            raise ModelError(
                f"Model {path}: its output '{value.name}' is {what}, not made by a node."
                " Export the model without it."
            )


def is_image(value: ir.Value) -> bool:
    """Whether an input can be a batch of images."""
    types = (*FLOATS, ir.DataType.UINT8)
    return value.dtype in types and value.shape is not None and len(value.shape) == 4


def _describe(value: ir.Value) -> str:
    dtype = "untyped" if value.dtype is None else value.dtype.name.lower()
    dims = "?"
    if value.shape is not None:
        dims = ", ".join(str(d if isinstance(d, int) else d.value or "?") for d in value.shape)
    return f"({dtype} [{dims}])"


def _check_weights(graph: ir.Graph, path: Path) -> None:
    """No NaN anywhere; an infinity only below, in a mask in front of a softmax."""
    for value, tensor in _constants(graph):
        try:
            array = tensor.numpy()
        except Exception as error:
            raise ModelError(
                f"Model {path}: tensor '{value.name}' cannot be read: {one_line(error)}."
            ) from error
        if tensor.dtype in FLOATS and array.ndim > 1 and not array.size:
            raise ModelError(
                f"Model {path}: tensor '{value.name}' {list(array.shape)} holds nothing; weights"
                " need at least one element. Export the model again."
            )
        if tensor.dtype not in FLOATS or np.isfinite(array).all():
            continue
        if np.isnan(array).any():
            what = "NaN"
        elif np.isposinf(array).any() or not _is_mask(value):
            what = "infinity"
        else:
            continue
        raise ModelError(
            f"Model {path}: tensor '{value.name}' holds {what}; weights must be finite."
            " Check the checkpoint that was exported."
        )


def _constants(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Initializers and the outputs of Constant nodes, with their tensors."""
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield value, value.const_value
    for node in graph:
        if node.op_type == "Constant" and node.domain == "":
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            if tensor is not None:
                yield node.outputs[0], tensor


def _is_mask(value: ir.Value) -> bool:
    """True where every way from the value leads into a softmax, by an Add or a Where."""
    uses = list(value.uses())
    for use in uses:
        if use.node.op_type == "Softmax":
            continue
        if use.node.op_type not in MASK_OPS or not _is_mask(use.node.outputs[0]):
            return False
    return bool(uses)
