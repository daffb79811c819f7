"""Runs single nodes of a fused graph in ONNX Runtime, in the very form they are exported in.

The exact simulator computes every op with these kernels: the node is cut out of the graph,
lowered by the exporter's own function with the specs that are active, and run with ONNX
Runtime's default optimizations, so that the same kernels do the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import Factor, rows_of
from ptq_onnx.blocks.element_map import is_part
from ptq_onnx.blocks.walking import is_constant, is_layout, name_of
from ptq_onnx.evaluation.network import open_with_fp8
from ptq_onnx.graph.expansions import standardise
from ptq_onnx.numerics.around.token_mean import TokenMean
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.qdq.lowering import lower


class NodeKernels:
    """ONNX Runtime sessions of single nodes, built when first needed.

    A node's session depends on which of the tensors around it are quantized at the moment
    (``active``), so analysis can switch any of them off.
    """

    def __init__(self, model: ir.Model, specs: Mapping[str, TensorSpec], threads: int = 0) -> None:
        self._model = model
        self.carried = carried_specs(model, specs)
        """Tensors that layout ops make of a quantized one: (its name, the spec they carry)."""
        self._specs = {**specs, **{t: spec for t, (_, spec) in self.carried.items()}}
        self._threads = threads
        self._nodes = {name_of(node): node for node in model.graph}
        self._sessions: dict[tuple[str, frozenset[str]], ort.InferenceSession] = {}

    def respecify(self, spec: TensorSpec) -> None:
        """Take other numbers of a tensor, of which no session was built yet."""
        self._specs[spec.tensor] = spec

    def inputs(self, name: str) -> list[str]:
        """Names of the node's inputs that are not constants, each once, in order."""
        node = self._nodes[name]
        read = (v.name for v in node.inputs if v is not None and not is_constant(v))
        return list(dict.fromkeys(str(n) for n in read))

    def run(
        self, name: str, active: frozenset[str], feeds: Mapping[str, NDArray[Any]]
    ) -> Sequence[NDArray[Any]]:
        """Outputs of the node for float inputs; inputs, weights and outputs whose names are
        ``active`` are quantized and dequantized on the way."""
        key = (name, active)
        if key not in self._sessions:
            self._sessions[key] = self._build(name, active)
        contiguous = {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in feeds.items()}
        outputs: Sequence[NDArray[Any]] = self._sessions[key].run(None, contiguous)
        return outputs

    def model_of(self, name: str, active: frozenset[str]) -> ir.Model:
        """The node alone, lowered, as a model in standard ONNX."""
        node = self._nodes[name]
        copies: dict[str, ir.Value] = {}
        inputs: list[ir.Value] = []
        constants: list[ir.Value] = []
        for value in node.inputs:
            if value is None or str(value.name) in copies:
                continue
            copy = ir.Value(name=value.name, shape=value.shape, type=value.type)
            copies[str(value.name)] = copy
            if is_constant(value):
                copy.const_value = value.const_value
                constants.append(copy)
            else:
                inputs.append(copy)
        clone = ir.Node(
            node.domain,
            node.op_type,
            [None if v is None else copies[str(v.name)] for v in node.inputs],
            node.attributes.values(),
            num_outputs=len(node.outputs),
            name=node.name,
        )
        for mine, original in zip(clone.outputs, node.outputs, strict=True):
            mine.name, mine.shape, mine.type = original.name, original.shape, original.type
        single = ir.Graph(
            inputs,
            [v for v in clone.outputs if v.name],
            nodes=[clone],
            initializers=constants,
            opset_imports=self._model.graph.opset_imports,
            name=node.name,
        )
        model = ir.Model(single, ir_version=self._model.ir_version)
        # The product that reads a centred V quantizes it: it needs the mean of the float V.
        made = {v.name for v in node.outputs}
        specs = {t: self._specs[t] for t in active}
        specs = {t: s for t, s in specs.items() if not (TokenMean() in s.rule.around and t in made)}
        return standardise(lower(model, specs))

    def _build(self, name: str, active: frozenset[str]) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        # Hundreds of sessions live side by side: no arena each, no threads that spin.
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        data = ir.serde.serialize_model(self.model_of(name, active)).SerializeToString()
        return open_with_fp8(data, options, ["CPUExecutionProvider"])


def carried_specs(
    model: ir.Model, specs: Mapping[str, TensorSpec]
) -> dict[str, tuple[str, TensorSpec]]:
    """Specs that quantized tensors keep on their way through layout ops to a compute op.

    By the name of the tensor that the compute op reads: the quantized tensor's name, and its
    spec with the factor moved to the last axis, or to axis 1 where the channels are there. A
    tensor whose factor fits neither is left out: it is read as floats.
    """
    found: dict[str, tuple[str, TensorSpec]] = {}
    for node in model.graph:
        if is_layout(node):
            continue
        for value in node.inputs:
            if value is None or str(value.name) in specs or is_constant(value):
                continue
            start = _quantized_before(value, specs)
            if start is None:
                continue
            spec = specs[str(start.name)]
            if spec.factor is not None:
                factor = moved_factor(start, value, spec.factor)
                if factor is None:
                    continue
                spec = spec.with_factor(factor)
            found[str(value.name)] = (str(start.name), replace(spec, tensor=str(value.name)))
    return found


def moved_factor(start: ir.Value, value: ir.Value, factor: Factor) -> Factor | None:
    """The factor of ``start`` as one of ``value``, a layout of it: [C], or [C, 1, …] where axis 1
    holds the channels; None where neither holds."""
    last = rows_of(start, value, factor)
    if last is not None or value.shape is None or len(value.shape) < 3:
        return last
    first = rows_of(start, value, factor, 1)
    return None if first is None else first.reshape(-1, *[1] * (len(value.shape) - 2))


def _quantized_before(value: ir.Value, specs: Mapping[str, TensorSpec]) -> ir.Value | None:
    """The tensor with a spec that ``value`` is a layout of, or None."""
    node, end = value.producer(), value
    while node is not None and is_layout(node) and node.op_type != "Shape":
        before = node.inputs[0]
        if before is None or is_constant(before):
            return None
        if str(before.name) in specs:
            return before if is_part(end, before) else None
        node = before.producer()
    return None
