"""Proved ranges: known answers, and what they warn of."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptq_onnx.targets.integer.ranges import Ranges, integer_ranges, register_bits

U8 = TensorProto.UINT8


def ranges(*nodes: tuple[Any, ...], shape: tuple[int, ...] = (2, 4), kind: int = U8) -> Ranges:
    """Ranges of a chain: (op, constants before or behind the value, attributes)."""
    made, constants, current = [], [], "x"
    for index, (op, others, *rest) in enumerate(nodes):
        names = []
        for other in others:
            if other is None:
                names.append(current)
                continue
            names.append(f"c{len(constants)}")
            constants.append(numpy_helper.from_array(np.asarray(other), names[-1]))
        out = f"y{index}"
        made.append(helper.make_node(op, names, [out], out, **(rest[0] if rest else {})))
        current = out
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [onnx.ValueInfoProto(name=current)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return integer_ranges(ir.from_proto(model))


def last(found: Ranges) -> tuple[int, int]:
    entry = list(found.tensors.values())[-1]
    return entry.low, entry.high


TO64 = ("Cast", [None], {"to": TensorProto.INT64})
KNOWN = [
    ((TO64, ("Sub", [None, np.int64(100)])), (-100, 155)),
    ((TO64, ("Sub", [None, np.array([0, 100, 255, 10])])), (-255, 255)),
    ((TO64, ("Mul", [None, np.int64(-3)])), (-765, 0)),
    ((TO64, ("Sub", [None, np.int64(100)]), ("Mul", [None, None])), (0, 155**2)),
    ((TO64, ("Sub", [None, np.int64(100)]), ("Abs", [None])), (0, 155)),
    ((TO64, ("Sub", [None, np.int64(300)]), ("Abs", [None])), (45, 300)),
    ((TO64, ("Sub", [None, np.int64(100)]), ("Div", [None, np.int64(7)])), (-14, 22)),
    ((TO64, ("ReduceSum", [None, np.array([-1])])), (0, 1020)),
    (
        (TO64, ("Mul", [None, np.array([1, 2, 3, 4])]), ("ReduceSum", [None, np.array([-1])])),
        (0, 2550),
    ),
    ((("BitShift", [None, np.uint8(3)], {"direction": "RIGHT"}),), (0, 31)),
    ((("Clip", [None, np.uint8(3), np.uint8(9)]),), (3, 9)),
    ((("Max", [None, np.uint8(3)]),), (3, 255)),
    ((("Min", [None, np.uint8(3)]),), (0, 3)),
    (
        (("MatMulInteger", [None, np.array([[1], [-2], [3], [-4]], np.int8), np.uint8(100)]),),
        (-400 - 6 * 155, 4 * 155 + 600),
    ),
    ((("Gather", [np.array([5, 7, 9] + [6] * 253), None]),), (5, 9)),
]


@pytest.mark.parametrize(("nodes", "expected"), KNOWN)
def test_known_ranges(nodes: tuple[Any, ...], expected: tuple[int, int]) -> None:
    found = ranges(*nodes)
    assert found.overflows == []
    assert last(found) == expected


TO32 = ("Cast", [None], {"to": TensorProto.INT32})
BAD = {
    "does not fit int32": (TO32, ("Mul", [None, np.int32(1 << 24)])),
    "does not fit uint8": (("Add", [None, np.uint8(1)]),),
    "does not fit uint64": (
        TO64,
        ("Sub", [None, np.int64(1)]),
        ("Cast", [None], {"to": TensorProto.UINT64}),
    ),
    "divisor can be zero": (TO64, ("Div", [np.int64(5), None])),
    "a shift by 0 to 255 of 8 bits": (("BitShift", [np.uint8(1), None], {"direction": "RIGHT"}),),
    "indices 0 to 255 of 4 entries": (("Gather", [np.arange(4), None]),),
}


@pytest.mark.parametrize("text", BAD)
def test_what_can_go_wrong_is_told(text: str) -> None:
    (found,) = ranges(*BAD[text]).overflows
    assert text in found.text


def test_register_widths() -> None:
    for low, high, bits in ((0, 255, 8), (0, 0, 1), (-128, 127, 8), (-129, 0, 9), (-1, 128, 9)):
        assert register_bits(low, high) == bits
