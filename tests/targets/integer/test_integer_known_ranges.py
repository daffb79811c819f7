"""Proved ranges of every op by hand: the widest that are true."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_integer_ranges import TO64, last, ranges

from ptq_onnx.targets.integer.builder import RANGE_KEY
from ptq_onnx.targets.integer.ranges import integer_ranges

LESS = ("Sub", [None, np.int64(100)])
RIGHT, LEFT = {"direction": "RIGHT"}, {"direction": "LEFT"}
TO32 = ("Cast", [None], {"to": TensorProto.UINT32})
CLIP3 = ("Clip", [None, np.uint8(0), np.uint8(3)])
CONV = np.array([[[[1, -2], [3, 4]]], [[[5, 0], [0, -6]]]]) + 128
RANGES: list[tuple[str, tuple[Any, ...], tuple[int, int], dict[str, Any]]] = [
    ("where", (("Greater", [None, np.uint8(3)]), ("Where", [None, np.int64(5), np.int64(9)])),
     (5, 9), {}),
    ("less", (("Less", [None, np.uint8(3)]), ("Cast", [None], {"to": TensorProto.INT64})),
     (0, 1), {}),
    ("at least", (("GreaterOrEqual", [None, np.uint8(3)]),
                  ("Cast", [None], {"to": TensorProto.INT64})), (0, 1), {}),
    ("concat", (TO64, ("Concat", [None, np.full((1, 4), -7)], {"axis": 0})), (-7, 255), {}),
    ("expand", (TO64, LESS, ("Expand", [None, np.array([3, 2, 4])])), (-100, 155), {}),
    ("square above", (TO64, ("Add", [None, np.int64(3)]), ("Mul", [None, None])), (9, 258**2), {}),
    ("square below", (TO64, ("Sub", [None, np.int64(300)]), ("Mul", [None, None])),
     (45**2, 300**2), {}),
    ("product", (TO64, LESS, ("Mul", [None, np.array([2, -3, 0, 1])])), (-465, 310), {}),
    ("divided by less than zero", (TO64, LESS, ("Div", [None, np.int64(-7)])), (-22, 14), {}),
    ("a part", (TO64, LESS, ("Div", [None, np.array([7, 9, 50, 2])])), (-50, 77), {}),
    ("left", (CLIP3, ("BitShift", [None, np.uint8(6)], LEFT)), (0, 192), {}),
    ("by itself", (CLIP3, ("BitShift", [np.uint8(200), None], RIGHT)), (25, 200), {}),
    ("32 bits", (TO32, ("BitShift", [None, np.uint32(20)], LEFT)), (0, 255 << 20), {}),
    ("and", (("BitwiseAnd", [None, np.uint8(7)]),), (0, 7), {}),
    ("and a wide one", (("BitwiseAnd", [np.uint8(255), None]),), (0, 255), {}),
    ("clip above", (TO64, LESS, ("Clip", [None, np.int64(-5)])), (-5, 155), {}),
    ("max of each", (TO64, ("Sub", [None, np.array([0, 300, 100, 50])]),
                     ("Max", [None, np.int64(-60)])), (-60, 255), {}),
    ("min of each", (TO64, ("Sub", [None, np.array([0, 300, 100, 50])]),
                     ("Min", [None, np.array([9, 0, 0, 0])])), (-300, 9), {}),
    ("abs of each", (TO64, ("Sub", [None, np.array([300, 400, 300, 500])]), ("Abs", [None])),
     (45, 500), {}),
    ("columns", (TO64, ("ReduceSum", [None, np.array([0])])), (0, 510), {}),
    ("all", (TO64, ("ReduceSum", [None, np.array([0, 1])])), (0, 2040), {}),
    ("most", (TO64, LESS, ("ReduceMax", [None, np.array([-1])])), (-100, 155), {}),
    ("each of a row", (TO64, ("Sub", [None, np.array([0, 10, 20, 30])]),
                       ("ReduceSum", [None, np.array([-1])])), (-60, 960), {}),
    ("reshaped", (TO64, ("Sub", [None, np.array([0, 10, 20, 30])]),
                  ("Reshape", [None, np.array([8])])), (-30, 255), {}),
    ("weight zero", (("MatMulInteger", [None, np.uint8([[1], [9], [5], [5]]), np.uint8(0),
                                        np.uint8(5)]),), (-4 * 255, 4 * 255), {}),
    ("convolution", (("ConvInteger", [None, CONV.astype(np.uint8), np.uint8(10), np.uint8(128)]),),
     (-6 * 245 - 50, 8 * 245 + 20), {"shape": (1, 1, 3, 3)}),
    ("entries", (("Clip", [None, np.uint8(0), np.uint8(2)]),
                 ("Gather", [np.array([[5, 7, 9], [1, 2, 3]]), None], {"axis": 1})), (1, 9), {}),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "expected", "more"), [r[1:] for r in RANGES],
                         ids=[r[0] for r in RANGES])  # fmt: skip
def test_ranges(nodes: tuple[Any, ...], expected: tuple[int, int], more: dict[str, Any]) -> None:
    found = ranges(*nodes, **more)
    assert found.overflows == []
    assert last(found) == expected


def test_a_range_that_does_not_fit_is_cut_to_the_type() -> None:
    found = ranges(("Add", [None, np.uint8(10)]), ("BitShift", [None, np.uint8(1)], RIGHT))
    assert [o.text for o in found.overflows] == ["[10, 265] does not fit uint8"]
    assert last(found) == (5, 127)
    late = ranges(("BitShift", [np.uint8(200), None], RIGHT))
    assert "a shift by 0 to 255 of 8 bits" in late.overflows[0].text
    assert last(late) == (1, 200)


def products(*shapes: tuple[int | str, ...]) -> onnx.ModelProto:
    """x · y of two inputs of bytes, y with zero point 3; then the sizes of the result."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMulInteger", ["x", "y", "zx", "zy"], ["p"], "p"),
            helper.make_node("Shape", ["p"], ["s"], "s"),
            helper.make_node("Gather", ["s", "i"], ["n"], "n"),
            helper.make_node("Concat", ["n", "n"], ["t"], "t", axis=0),
            helper.make_node("ReduceSum", ["p", "i"], ["q"], "q"),
        ],
        "g",
        [helper.make_tensor_value_info(n, TensorProto.UINT8, s)
         for n, s in zip("xy", shapes, strict=True)],
        [onnx.ValueInfoProto(name="q"), onnx.ValueInfoProto(name="t")],
        [numpy_helper.from_array(v, n) for n, v in
         (("zx", np.uint8(5)), ("zy", np.uint8(3)), ("i", np.array([1])))],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_products_of_two_inputs() -> None:
    model = ir.from_proto(products((2, 4), (4, 6)))
    found = integer_ranges(model, {"y": (0, 15)})
    assert found.overflows == []
    p = found.tensors["p"]
    assert (p.low, p.high, p.dtype, p.op_type) == (
        4 * -3 * 250,
        4 * 12 * 250,
        "int32",
        "MatMulInteger",
    )
    assert (found.tensors["q"].low, found.tensors["q"].high) == (6 * p.low, 6 * p.high)
    assert set(found.tensors) == {"p", "q"}, "sizes are no tensors of the hardware"
    assert not p.claimed
    unknown = integer_ranges(ir.from_proto(products((2, "k"), ("k", "n"))))
    texts = [o.text for o in unknown.overflows]
    assert texts == ["the number of addends is not known"] * 2


def test_a_proof_is_believed_and_marked() -> None:
    model = ir.from_proto(products((2, 4), (4, 6)))
    node = next(n for n in model.graph if n.name == "p")
    node.metadata_props[RANGE_KEY] = "-7 9"
    found = integer_ranges(model).tensors["p"]
    assert (found.low, found.high, found.claimed) == (-7, 9, True)


def test_a_divisor_around_zero_is_told() -> None:
    found = ranges(TO64, LESS, ("Div", [np.int64(5), None]))
    assert [o.text for o in found.overflows] == ["the divisor can be zero"]
    assert last(found) == (5, 5)
