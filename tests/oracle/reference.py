"""Runs a float ONNX model node by node, every tensor of the report replaced by its coded self.

Each node is a session of its own with float kernels (no optimizations), so that nothing is moved,
folded or fused. This is what the report says the numbers mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from .formats import Coded, Format

Array = NDArray[Any]


@dataclass(frozen=True)
class Trace:
    """Every quantized activation of one run, and the outputs of the graph by name."""

    coded: Mapping[str, Coded]
    outputs: Mapping[str, Array]


class Reference:
    """The meaning of a model under formats by tensor; none: the float model."""

    def __init__(self, path: Path, formats: Iterable[Format]) -> None:
        self.model = onnx.load(path)
        self.formats = {f.name: f for f in formats}
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.model.graph.initializer}
        for node in self.model.graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = _constant(node)
        known = self.constants.keys() | {o for n in self.model.graph.node for o in n.output}
        known |= {i.name for i in self.model.graph.input}
        missing = self.formats.keys() - known
        assert not missing, f"the report names tensors that the model has not: {sorted(missing)}"
        for name, found in self.formats.items():
            if found.parameter:
                self.constants[name] = found.apply(self.constants[name]).values.astype(np.float32)
        self._sessions: dict[int, ort.InferenceSession] = {}

    def run(self, x: Array) -> Trace:
        """One batch through the graph."""
        tensors: dict[str, Array] = dict(self.constants)
        coded: dict[str, Coded] = {}
        for item in self.model.graph.input:
            if item.name not in self.constants:
                self._keep(item.name, x, tensors, coded)
        for index, node in enumerate(self.model.graph.node):
            if node.op_type == "Constant":
                continue
            for name, value in zip(node.output, self._compute(index, node, tensors), strict=True):
                self._keep(name, self._restored(node, value, coded), tensors, coded)
        return Trace(coded, {o.name: tensors[o.name] for o in self.model.graph.output})

    def _keep(
        self, name: str, value: Array, tensors: dict[str, Array], coded: dict[str, Coded]
    ) -> None:
        found = self.formats.get(name)
        if found is None:
            tensors[name] = value
            return
        coded[name] = found.apply(value)
        tensors[name] = coded[name].values.astype(np.float32)

    def _restored(self, node: onnx.NodeProto, value: Array, coded: Mapping[str, Coded]) -> Array:
        """A·V: what codes of A and of V leave to be done behind the product."""
        for index, name in enumerate(node.input):
            found, tensor = self.formats.get(name), coded.get(name)
            if found is None or tensor is None:
                continue
            product = node.op_type == "MatMul"
            if found.renormalize and product and index == 0:
                value = value / tensor.values.sum(axis=-1, keepdims=True).astype(np.float32)
            if tensor.removed is not None:
                assert product, f"{node.op_type} reads {name}, whose mean a product gives back"
                assert index == 1
                value = value + tensor.removed.astype(np.float32)
        return value

    def _compute(
        self, index: int, node: onnx.NodeProto, tensors: Mapping[str, Array]
    ) -> list[Array]:
        feeds = {name: tensors[name] for name in node.input if name}
        if index not in self._sessions:
            self._sessions[index] = _session(node, feeds, self.model)
        wanted = {i.name for i in self._sessions[index].get_inputs()}
        given = {n: np.ascontiguousarray(v).reshape(v.shape) for n, v in feeds.items()}
        named = [o for o in node.output if o]
        found = self._sessions[index].run(named, {n: v for n, v in given.items() if n in wanted})
        return [np.asarray(v) for v in found]


def _session(
    node: onnx.NodeProto, feeds: Mapping[str, Array], model: onnx.ModelProto
) -> ort.InferenceSession:
    def info(name: str, array: Array) -> onnx.ValueInfoProto:
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        return helper.make_tensor_value_info(name, kind, [None] * array.ndim)

    graph = helper.make_graph(
        [node],
        "node",
        [info(name, array) for name, array in feeds.items()],
        [onnx.ValueInfoProto(name=name) for name in node.output if name],
    )
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return open_session(alone, optimize=False)


def open_session(
    model: onnx.ModelProto, *, optimize: bool, floats: bool = False
) -> ort.InferenceSession:
    """Plain ONNX Runtime, which by default rounds the inputs of products with 4-bit weights to 8
    bits: here it computes them in float. ``floats``: products of 8-bit floats are computed as they
    stand, which version 1.31 refuses to open otherwise."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if floats:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _constant(node: onnx.NodeProto) -> Array:
    held = node.attribute[0]
    if held.name == "value":
        return numpy_helper.to_array(held.t)
    array = np.asarray(helper.get_attribute_value(held))
    return array.astype(np.float32) if array.dtype.kind == "f" else array
