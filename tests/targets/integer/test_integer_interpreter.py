"""The interpreter refuses what a runtime would wrap, and divides as ONNX says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptq_onnx.errors import ModelError
from ptq_onnx.targets.integer.interpreter import IntegerOverflow, Interpreter, differing_tensors


def single(op: str, x: np.ndarray, *others: Any, **attributes: Any) -> onnx.ModelProto:
    """One node: the input x, then constants."""
    constants = [numpy_helper.from_array(np.asarray(v), f"c{i}") for i, v in enumerate(others)]
    names = ["x", *(c.name for c in constants)]
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], "node", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [onnx.ValueInfoProto(name="y")],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


OVERFLOWS = {
    "sum": ("Add", np.array([2**62]), (np.array([2**62]),), {}),
    "difference": ("Sub", np.array([3], np.uint8), (np.array([4], np.uint8),), {}),
    "product": ("Mul", np.array([2**20], np.int32), (np.array([2**11], np.int32),), {}),
    "cast": ("Cast", np.array([256], np.int64), (), {"to": TensorProto.UINT8}),
    "negative cast": ("Cast", np.array([-1], np.int64), (), {"to": TensorProto.UINT64}),
    "wide shift": (
        "BitShift",
        np.array([1], np.uint32),
        (np.array([32], np.uint32),),
        {"direction": "RIGHT"},
    ),
    "lost bits": (
        "BitShift",
        np.array([3], np.uint32),
        (np.array([31], np.uint32),),
        {"direction": "LEFT"},
    ),
    "magnitude": ("Abs", np.array([5, -(2**31)], np.int32), (), {}),
    "zero divisor": ("Div", np.array([1]), (np.array([0]),), {}),
    "row": ("ReduceSum", np.full(3, 2**30, np.int32), (np.array([0]),), {}),
    "index": ("Gather", np.arange(4), (np.array([4]),), {}),
    "int32 product": (
        "MatMulInteger",
        np.full((1, 70000), 255, np.uint8),
        (np.full((70000, 1), 255, np.uint8),),
        {},
    ),
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_overflow_names_the_node(name: str) -> None:
    op, x, others, attributes = OVERFLOWS[name]
    with pytest.raises(IntegerOverflow, match=rf"^Node 'node' \({op}\): "):
        Interpreter(single(op, x, *others, **attributes)).run(x)


def test_extremes_that_never_meet_are_no_overflow() -> None:
    x = np.array([2**62, 0])
    found = Interpreter(single("Add", x, np.array([0, 2**62]))).run(x)["y"]
    assert found.tolist() == [2**62, 2**62]


@pytest.mark.parametrize(
    ("op", "x", "others", "attributes"),
    [
        ("Div", np.array([-7, 7, -7, 6, 0]), (np.array([2, -2, -2, 3, 5]),), {}),
        ("Div", np.array([7, 255], np.uint8), (np.array([2, 16], np.uint8),), {}),
        ("Abs", np.array([-(2**31) + 1, -1, 0, 7], np.int32), (), {}),
        ("Clip", np.arange(-5, 5), (np.int64(-2), np.int64(3)), {}),
        ("ReduceMax", np.arange(12, dtype=np.uint8).reshape(3, 4), (np.array([-1]),), {}),
        ("Slice", np.arange(12).reshape(3, 4), (np.array([1]), np.array([9]), np.array([1])), {}),
        ("Flatten", np.arange(24).reshape(2, 3, 4), (), {"axis": 2}),
        ("Split", np.arange(12).reshape(4, 3), (np.array([4]),), {"axis": 0}),
        ("Unsqueeze", np.arange(3), (np.array([0]),), {}),
        ("Reshape", np.arange(12).reshape(3, 4), (np.array([0, 2, -1]),), {}),
        (
            "ConvInteger",
            np.random.default_rng(0).integers(0, 256, (2, 3, 7, 6)).astype(np.uint8),
            (
                np.random.default_rng(1).integers(0, 256, (4, 3, 3, 2)).astype(np.uint8),
                np.uint8(3),
                np.uint8(128),
            ),
            {"strides": [2, 1]},
        ),
    ],
)
def test_ops_are_those_of_onnx_runtime(
    op: str, x: np.ndarray, others: tuple[Any, ...], attributes: dict[str, Any]
) -> None:
    count, different, _ = differing_tensors(single(op, x, *others, **attributes), [x])
    assert (count, different) == (1, [])


def test_a_difference_is_found() -> None:
    """A file that the interpreter reads in another way than the runtime."""
    x = np.array([0.5, 1.5, 2.5], np.float32)
    model = single("QuantizeLinear", x, np.float32(1), np.uint8(0))
    assert differing_tensors(model, [x])[1] == []
    from ptq_onnx.targets.integer import interpreter as module

    before = module.OPS["QuantizeLinear"]
    module.OPS["QuantizeLinear"] = lambda i, a: before(i, a) + np.uint8(1)
    try:
        assert differing_tensors(model, [x])[1] == ["y"]
    finally:
        module.OPS["QuantizeLinear"] = before


def test_ranges_of_all_runs() -> None:
    x = np.arange(4)
    interpreter = Interpreter(single("Add", x, np.array(10)))
    interpreter.run(x)
    interpreter.run(x - 7)
    assert interpreter.ranges == {"y": (3, 13)}


def test_unknown_ops_are_refused() -> None:
    x = np.zeros(3, np.float32)
    with pytest.raises(ModelError, match=r"Node 'node' \(Exp\): not an op of integer files"):
        Interpreter(single("Exp", x))
