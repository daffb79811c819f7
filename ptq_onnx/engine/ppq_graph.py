"""A fused model as PPQ's graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ptq_onnx.blocks.walking import is_constant, name_of
from ptq_onnx.engine.ppq_import import (
    BaseGraph,
    Operation,
    QuantableOperation,
    TargetPlatform,
    Variable,
)

EXACT = TargetPlatform.ONNXRUNTIME
"""The platform whose every handler is the exact kernel of the node (see node_sessions.py)."""
FAKE = TargetPlatform.INT8
"""The platform of PPQ's torch handlers, ours in place of missing or wrong ones."""

KERNEL = "ptq_onnx.kernel"
ORIGIN = "ptq_onnx.origin"
SPEC = "ptq_onnx.spec"


def build_graph(model: ir.Model) -> BaseGraph:
    """PPQ's graph of a fused model; a fused linear becomes ``PPQBiasFusedMatMul``.

    Names are kept. A parameter with several readers is given to PPQ once per reader (it
    refuses shared ones); ``extension_attrib[ORIGIN]`` maps the copies' names back.
    """
    graph = BaseGraph(name=model.graph.name or "model")
    origin: dict[str, str] = {}
    variables: dict[str, Variable] = {}

    def variable(value: ir.Value, reader: str) -> Variable:
        name = str(value.name)
        constant = is_constant(value)
        if constant and len(value.uses()) > 1:
            origin[f"{name}@{reader}"] = name
            name = f"{name}@{reader}"
        if name not in variables:
            data = None
            if constant and value.const_value is not None:
                data = _tensor(value.const_value.numpy())
            variables[name] = Variable(name=name, value=data, is_parameter=constant)
            graph.append_variable(variables[name])
        return variables[name]

    for node in model.graph:
        linear = node.domain == "ptq_onnx" and node.op_type == "Linear"
        kind = node.op_type
        if linear:
            biased = len(node.inputs) > 2 and node.inputs[2] is not None
            kind = "PPQBiasFusedMatMul" if biased else "MatMul"
        operation = Operation(name=name_of(node), op_type=kind, attributes=attributes_of(node))
        graph.append_operation(operation)
        for index, value in enumerate(node.inputs):
            if value is None:
                empty = Variable(name=f"{operation.name}/empty/{index}")
                graph.append_variable(empty)
                _read(operation, empty)
            else:
                _read(operation, variable(value, f"{operation.name}:{index}"))
        for value in node.outputs:
            made = variable(value, operation.name)
            made.source_op = operation
            operation.outputs.append(made)
    for value in model.graph.inputs:
        if value.name in variables:
            graph.inputs[value.name] = variables[value.name]
    for value in model.graph.outputs:
        graph.outputs[value.name] = variables[str(value.name)]
    graph.set_extension_attrib(ORIGIN, origin)
    graph.set_extension_attrib("IS_DISPATCHED_GRAPH", True)
    return graph


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The weight itself: what runs here replaces parameters, and changes none in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mapped files cannot be written to, nor is that wanted
        return torch.from_numpy(np.asarray(array))


@contextlib.contextmanager
def without_clones() -> Iterator[None]:
    """PPQ keeps a second copy of every weight; here only a reference."""

    def store(self: QuantableOperation) -> QuantableOperation:
        for variable in [*self.inputs, *self.outputs]:
            if variable.is_parameter:
                variable.stored_value = variable.value
        return self

    original = QuantableOperation.store_parameter_value
    QuantableOperation.store_parameter_value = store
    try:
        yield
    finally:
        QuantableOperation.store_parameter_value = original


def _read(operation: Operation, value: Variable) -> None:
    operation.inputs.append(value)
    value.dest_ops.append(operation)


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """Plain Python values; tensors as torch tensors."""
    out: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        value = attribute.value
        if isinstance(value, ir.TensorProtocol):
            value = torch.from_numpy(np.array(value.numpy()))
        elif isinstance(value, tuple):
            value = list(value)
        out[name] = value
    return out
