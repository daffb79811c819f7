"""A whole model in integers: interpreter, ONNX Runtime and simulator agree to the bit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from prepared_models import decibels

from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import SiteQuantizer
from ptq_onnx.targets.integer.interpreter import differing_tensors
from ptq_onnx.targets.integer.lowering import lower_integer
from ptq_onnx.targets.integer.ranges import integer_ranges
from ptq_onnx.targets.integer.rules import violations
from ptq_onnx.targets.integer.simulated_steps import integer_overrides


def opened(model: ir.Model) -> ort.InferenceSession:
    """A file of thousands of nodes takes a second to open, and hardly one to run."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        graphs.serialize(model), options, providers=["CPUExecutionProvider"]
    )


def run(model: ir.Model, batch: np.ndarray) -> np.ndarray:
    """The first output in ONNX Runtime, optimizations on."""
    session = opened(model)
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: batch})[0]
    return found


def assert_exact(model: ir.Model, quantizer: SiteQuantizer, batch: np.ndarray) -> None:
    """No rule is broken, every tensor has the interpreter's bits and stays in its proved range, the
    output is the simulator's, and as near to float as that of float arithmetic, to 1.5 dB."""
    file = lower_integer(model, quantizer.specs)
    assert violations(file) == []
    half = len(batch) // 2 + 1
    _, different, seen = differing_tensors(ir.to_proto(file), [batch[:half], batch[half:]])
    assert different == []
    for name, entry in integer_ranges(file).tensors.items():
        assert entry.low <= seen[name][0] <= seen[name][1] <= entry.high, name
    overrides, left = integer_overrides(model, quantizer.specs)
    assert left == []
    simulator = Simulator(model, quantizer, overrides=overrides, threads=1)
    output = str(model.graph.outputs[0].name)
    made = run(file, batch)
    np.testing.assert_array_equal(made, simulator.run(batch)[output])
    plain = run(model, batch)
    floating = decibels(run(lower(model, quantizer.specs), batch), plain)
    assert decibels(made, plain) > min(floating, 20) - 1.5
