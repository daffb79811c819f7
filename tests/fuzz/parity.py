"""Whether a fused float model computes what the original does, in ONNX Runtime."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from fuzz.oracle import Wrong, oracle_runs

TOLERANCE = 1e-3
SIDE = {"batch": 2}
DEFAULT_SIDE = 8
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
PLAIN = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
BFLOAT16 = onnx.TensorProto.BFLOAT16
FULL = ort.GraphOptimizationLevel.ORT_ENABLE_ALL

Arrays = list[NDArray[Any]]


def check_parity(original: Path, fused: str | bytes) -> None:
    """Raise Wrong where the outputs differ by more than 1e-3 of their size.

    Where the original cannot be run, or its own numbers are not finite or change as much when
    ONNX Runtime optimises it or its input moves by 1e-6, there is nothing to compare with.
    A fused model is float32: round trips through bfloat16, of 8 bits, are not asked of it.
    """
    with oracle_runs():
        _compare(_without_bfloat16(original), fused)


def _compare(reference: str | bytes, fused: str | bytes) -> None:
    expected = outputs(reference, PLAIN)
    if expected is None:
        return
    wobble = max(
        _distance(expected, outputs(reference, FULL)),
        _distance(expected, outputs(reference, PLAIN, nudge=1e-6)),
    )
    found = outputs(fused, PLAIN)
    if found is None:
        raise Wrong("the fused model does not run, the original does")
    distance = _distance(expected, found)
    if not distance <= max(TOLERANCE, 20 * wobble):
        raise Wrong(f"differs by {distance:g}, the original from itself by {wobble:g}")


def outputs(
    model: str | bytes, level: ort.GraphOptimizationLevel, nudge: float = 0.0
) -> Arrays | None:
    """All outputs for one input; None where it does not run."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        sides = [_side(d) for d in given.shape]
        if len(sides) == 4 and isinstance(given.shape[0], str | None):
            sides[0] = 2
        pixels = np.random.default_rng(0).standard_normal(sides) * (1 + nudge)
        quiet = ort.RunOptions()
        quiet.log_severity_level = 4
        return list(session.run(None, {given.name: pixels.astype(TYPES[given.type])}, quiet))
    except Exception:
        return None


def _without_bfloat16(model: Path) -> str | bytes:
    """The model with casts to bfloat16 as casts to float32; its path without any."""
    proto = onnx.load(model)
    casts = [
        attribute
        for node in proto.graph.node
        for attribute in node.attribute
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == BFLOAT16
    ]
    if not casts:
        return str(model)
    for attribute in casts:
        attribute.i = onnx.TensorProto.FLOAT
    return proto.SerializeToString()


def _side(dim: int | str | None) -> int:
    """A side as it is, or one for a side that is free; 0 is free too."""
    return dim if isinstance(dim, int) and dim > 0 else SIDE.get(str(dim), DEFAULT_SIDE)


def _distance(expected: Arrays, found: Arrays | None) -> float:
    """The largest difference of an output, by the largest value of the original there; 0 for an
    original that is not finite; infinite for another shape."""
    if found is None or len(found) != len(expected):
        return math.inf
    most = 0.0
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            return math.inf
        if one.dtype.kind != "f":
            most = max(most, float(not np.array_equal(one, other)))
            continue
        if not np.isfinite(one).all() or not one.size:
            continue
        if not np.isfinite(other).all():
            return math.inf
        size = float(np.abs(one).max()) or 1.0
        most = max(most, float(np.abs(one.astype(float) - other.astype(float)).max()) / size)
    return most
