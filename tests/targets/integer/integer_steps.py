"""Runs one step of the integer target in ONNX Runtime and in the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ptq_onnx.targets.integer.builder import Builder
from ptq_onnx.targets.integer.interpreter import Interpreter
from ptq_onnx.targets.integer.ranges import integer_ranges

Ints = NDArray[np.int64]


def model_of(step: Any, *inputs: NDArray[Any]) -> onnx.ModelProto:
    """The step's nodes, with inputs of those shapes and types."""
    b = Builder()
    values = [
        ir.Value(
            name=f"x{i}",
            shape=ir.Shape(x.shape),
            type=ir.TensorType(ir.DataType.from_numpy(x.dtype)),
        )
        for i, x in enumerate(inputs)
    ]
    output = step.emit(b, *values, "y")
    graph = ir.Graph(
        values,
        [output],
        nodes=b.nodes,
        initializers=b.constants,
        opset_imports={"": 21},
        name="step",
    )
    return ir.to_proto(ir.Model(graph, ir_version=10))


def run(step: Any, *inputs: NDArray[Any], limits: dict[str, tuple[int, int]] | None = None) -> Ints:
    """The step's output in ONNX Runtime; the interpreter must give the same, without overflow,
    and every tensor must stay in its proved range (``limits``: those of the inputs)."""
    proto = model_of(step, *inputs)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {f"x{i}": x for i, x in enumerate(inputs)})
    interpreter = Interpreter(proto)
    interpreter.inputs = interpreter.inputs[:1]
    interpreter.constants.update({f"x{i}": x for i, x in enumerate(inputs) if i})
    np.testing.assert_array_equal(interpreter.run(inputs[0])["y"], found)
    proved = integer_ranges(ir.from_proto(proto), limits)
    assert proved.overflows == []
    for name, (low, high) in interpreter.ranges.items():
        entry = proved.tensors[name]
        assert entry.low <= low, name
        assert high <= entry.high, name
    return np.asarray(found, np.int64)
