"""Ops of integer files: as ONNX Runtime computes them, up to the last number that fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from test_integer_interpreter import single

from ptq_onnx.errors import ModelError
from ptq_onnx.targets.integer.builder import Builder
from ptq_onnx.targets.integer.elementwise import FUNCTIONS
from ptq_onnx.targets.integer.interpreter import IntegerOverflow, Interpreter, differing_tensors
from ptq_onnx.targets.integer.layer_norm import emit_root

A = np.arange(24).reshape(2, 3, 4)
SAME: list[tuple[str, np.ndarray, tuple[Any, ...], dict[str, Any]]] = [
    ("ReduceSum", A, (np.array([1]),), {"keepdims": 0}),
    ("ReduceSum", A, (np.array([0, 2]),), {"keepdims": 1}),
    ("ReduceSum", A, (np.array([-1]),), {}),
    ("ReduceMax", A, (np.array([1]),), {"keepdims": 0}),
    ("ReduceMax", A, (np.array([1]),), {}),
    ("Expand", A[:, :1], (np.array([3, 1]),), {}),
    ("Shape", A, (), {}),
    ("Shape", A, (), {"start": 1}),
    ("Shape", A, (), {"end": -1}),
    ("Shape", A, (), {"start": 0, "end": 2}),
    ("Slice", A, (np.array([1]), np.array([2])), {}),
    ("Slice", A, (np.array([0, 1]), np.array([2, 4]), np.array([0, 2]), np.array([1, 2])), {}),
    ("Squeeze", A[:, :1], (np.array([1]),), {}),
    ("Squeeze", A[:, :1], (), {}),
    ("Flatten", A, (), {}),
    ("Reshape", A, (np.array([0, -1]),), {}),
    ("Reshape", A[:, :0], (np.array([0, 4]),), {"allowzero": 1}),
    ("Gather", A, (np.array([-1, 0]),), {"axis": 2}),
    ("Gather", A, (np.array([1, -2]),), {}),
    ("Transpose", A, (), {}),
    ("Transpose", A, (), {"perm": [1, 0, 2]}),
    ("Concat", A, (A,), {"axis": 1}),
    ("Unsqueeze", A, (np.array([0, -1]),), {}),
    ("Split", A, (np.array([3]),), {"axis": 1}),
    ("BitwiseAnd", A, (np.array(6),), {}),
    ("BitShift", A.astype(np.uint64), (np.array(2, np.uint64),), {"direction": "LEFT"}),
    ("BitShift", A.astype(np.uint8), (np.array(2, np.uint8),), {"direction": "RIGHT"}),
    ("Cast", A, (), {"to": TensorProto.INT32}),
    ("Max", A, (np.array(7),), {}),
    ("Min", A, (np.array(7),), {}),
    ("Less", A, (np.array(7),), {}),
    ("Greater", A, (np.array(7),), {}),
    ("GreaterOrEqual", A, (np.array(7),), {}),
    ("Where", A > 5, (A, -A), {}),
    ("Sub", A.astype(np.float32), (np.float32(0.3),), {}),
    ("QuantizeLinear", np.float32([-9, 0.3, 1.5, 300]), (np.float32(0.5), np.uint8(9)), {}),
    ("QuantizeLinear", np.float32([-99, 0.3, 0.5, 70]), (np.float32(0.5), np.int8(-9)), {}),
    ("DequantizeLinear", np.uint8([0, 9, 255]), (np.float32(0.3), np.uint8(9)), {}),
    ("MatMulInteger", np.uint8(A), (np.uint8(A.transpose(0, 2, 1)), np.uint8(3)), {}),
    ("ConvInteger", np.uint8(np.arange(64).reshape(1, 2, 8, 4)),
     (np.uint8(np.arange(36).reshape(3, 2, 2, 3)),), {}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "x", "others", "attributes"), SAME, ids=lambda v: str(v)[:20])
def test_ops(op: str, x: np.ndarray, others: tuple[Any, ...], attributes: dict[str, Any]) -> None:
    assert differing_tensors(single(op, x, *others, **attributes), [x])[:2] == (1, [])


def test_split_into_equal_parts_and_the_rest() -> None:
    x = np.arange(7)
    model = single("Split", x, axis=0, num_outputs=3)
    del model.graph.node[0].output[:]
    model.graph.node[0].output.extend(["y", "z", "w"])
    model.graph.output.extend([onnx.ValueInfoProto(name=n) for n in "zw"])
    found = Interpreter(model).run(x)
    assert [found[n].tolist() for n in "yzw"] == [[0, 1, 2], [3, 4, 5], [6]]


BIG = 2**63 - 1
EDGES: list[tuple[str, np.ndarray, tuple[Any, ...], dict[str, Any], bool]] = [
    ("Add", np.array([BIG - 1, -5]), (np.array([1, -4]),), {}, True),
    ("Add", np.array([BIG - 1, -5]), (np.array([2, -4]),), {}, False),
    ("Mul", np.array([-(2**62), 1]), (np.array([2, 1]),), {}, True),
    ("Mul", np.array([2**62, 1]), (np.array([2, 1]),), {}, False),
    ("Sub", np.array([4, 9], np.uint8), (np.array([4, 0], np.uint8),), {}, True),
    ("Add", np.array([100, 1], np.int8), (np.array([27, 0], np.int8),), {}, True),
    ("Add", np.array([100, 1], np.int8), (np.array([28, 0], np.int8),), {}, False),
    ("Cast", np.array([255, 0]), (), {"to": TensorProto.UINT8}, True),
    ("Cast", np.array([127, -128]), (), {"to": TensorProto.INT8}, True),
    ("Cast", np.array([128, 0]), (), {"to": TensorProto.INT8}, False),
    ("ReduceSum", np.array([2**31 - 2, 1], np.int32), (np.array([0]),), {}, True),
    ("ReduceSum", np.array([2**31 - 1, 1], np.int32), (np.array([0]),), {}, False),
    ("ReduceSum", np.array([BIG, -2, 1]), (np.array([0]),), {}, True),
    ("ReduceSum", np.array([BIG, -2, 4]), (np.array([0]),), {}, False),
    ("ReduceSum", np.full((2, 3), -(2**62)), (np.array([1]),), {}, False),
    ("ReduceSum", np.full((3, 2), -(2**62)), (np.array([1]),), {}, True),
    ("ReduceSum", np.full((2, 3), 2**61), (np.array([0, 1]),), {}, False),
    ("Abs", np.array([-(2**31) + 1, 5], np.int32), (), {}, True),
    ("BitShift", np.array([1], np.uint8), (np.array([7], np.uint8),), {"direction": "LEFT"}, True),
    ("BitShift", np.uint8([1]), (np.uint8([8]),), {"direction": "RIGHT"}, False),
    ("BitShift", np.uint8([0, 0]), (np.uint8([1, 8]),), {"direction": "LEFT"}, False),
    ("BitShift", np.uint16([9, 9]), (np.uint16([15, 0]),), {"direction": "RIGHT"}, True),
    ("Gather", np.arange(4), (np.array([3, -4]),), {}, True),
    ("Gather", np.arange(4), (np.array([-5]),), {}, False),
    ("Div", np.array([7]), (np.array([1, 0]),), {}, False),
    ("MatMulInteger", np.full((1, 33025), 255, np.uint8), (np.full((33025, 1), 255, np.uint8),),
     {}, True),
    ("MatMulInteger", np.full((1, 33026), 255, np.uint8), (np.full((33026, 1), 255, np.uint8),),
     {}, False),
]  # fmt: skip


@pytest.mark.parametrize(("op", "x", "others", "attributes", "fits"), EDGES)
def test_the_last_number_that_fits(
    op: str, x: np.ndarray, others: tuple[Any, ...], attributes: dict[str, Any], fits: bool
) -> None:
    model = Interpreter(single(op, x, *others, **attributes))
    if fits:
        assert model.run(x)["y"].size
        return
    with pytest.raises(IntegerOverflow):
        model.run(x)


def test_what_is_not_interpreted() -> None:
    steps = (np.array([3]), np.array([0]), np.array([0]), np.array([-1]))
    with pytest.raises(ModelError, match="negative step"):
        Interpreter(single("Slice", A, *steps)).run(A)
    signed = np.array([1, 2])
    with pytest.raises(IntegerOverflow, match="unsigned integers of one type, not int64"):
        Interpreter(single("BitShift", signed, np.array([1]), direction="RIGHT")).run(signed)
    with pytest.raises(IntegerOverflow, match="types int64 and int32 differ"):
        Interpreter(single("Add", signed, np.array([1], np.int32))).run(signed)


def test_the_root_in_the_file() -> None:
    """Around 2^60, where the start is farthest off, at 9/4 of it, where it is nearest, and at the
    last number."""
    centres = np.array([2**60, 9 * 2**58, 2**62 - 1, 2**61, 3 * 2**60])
    near = np.concatenate([c + np.arange(-500, 500) for c in centres.tolist()])
    roots = np.array([math.isqrt(v) for v in near.tolist()])
    w = np.concatenate([near, roots**2, (roots + 1) ** 2 - 1])
    w = w[(w >= 2**60) & (w < 2**62)]
    b = Builder()
    x = ir.Value(name="x", shape=ir.Shape(w.shape), type=ir.TensorType(ir.DataType.INT64))
    y = emit_root(b, x)
    graph = ir.Graph([x], [y], nodes=b.nodes, initializers=b.constants, opset_imports={"": 21})
    found = Interpreter(ir.to_proto(ir.Model(graph, ir_version=10))).run(w)
    expected = [math.isqrt(v) for v in w.tolist()]
    assert next(iter(found.values())).tolist() == expected


BY_HAND: dict[str, Callable[[float], float]] = {
    "Gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "QuickGelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "Silu": lambda x: x / (1 + math.exp(-x)),
    "Relu": lambda x: max(x, 0.0),
    "Sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "Tanh": math.tanh,
    "Erf": math.erf,
    "HardSwish": lambda x: x * min(max(x + 3, 0), 6) / 6,
    "Mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
}


@pytest.mark.parametrize("op", sorted(FUNCTIONS))
def test_functions(op: str) -> None:
    node = ir.node(op, [None])
    x = np.linspace(-8, 8, 41)
    np.testing.assert_allclose(
        FUNCTIONS[op](x, node), [BY_HAND[op](v) for v in x.tolist()], rtol=1e-12, atol=1e-14
    )
    far = FUNCTIONS[op](np.array([-900.0, 900.0]), node)
    assert np.isfinite(far).all()
    if op == "Gelu":
        tanh = ir.node(op, [None], {"approximate": "tanh"})
        c = math.sqrt(2 / math.pi)
        expected = [v / 2 * (1 + math.tanh(c * (v + 0.044715 * v**3))) for v in x.tolist()]
        np.testing.assert_allclose(FUNCTIONS[op](x, tanh), expected, rtol=1e-12, atol=1e-14)
