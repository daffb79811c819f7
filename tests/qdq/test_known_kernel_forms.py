"""Which second factors and biases get the kernels' forms in graphs of a few ops, and which not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, assert_shapes, run, sample

from ptq_onnx.fusion.rules import fuse
from ptq_onnx.preparation.model_files import to_standard
from ptq_onnx.qdq.four_bits import store_in_four_bits
from ptq_onnx.qdq.kernel_forms import suit_kernels

B, T, D = "batch", 4, 8
Outputs = tuple[str, ...]
Build = Callable[[SmallGraph], str | Outputs]
SCALE, ZERO = np.float32(0.05), np.uint8(100)


def coded(g: SmallGraph, value: str, zero: Any = ZERO, scale: Any = SCALE) -> str:
    """Q and DQ with the same scale and zero point; the DQ's output."""
    numbers = (g.const(scale), g.const(zero))
    codes = g("QuantizeLinear", value, *numbers, axis=1)
    return g("DequantizeLinear", codes, *numbers, axis=1)


def turned(g: SmallGraph) -> str:
    return g("Transpose", g("Relu", "x"), perm=[0, 2, 1])


def moved_twice(g: SmallGraph) -> str:
    wide = g("Reshape", g("Relu", "x"), np.array([0, -1, 1, T]))
    last = g("Squeeze", g("Transpose", wide, perm=[0, 3, 1, 2]), np.array([3]))
    return g("MatMul", "x", coded(g, g("Transpose", last, perm=[0, 2, 1])))


def two_products(g: SmallGraph) -> Outputs:
    k = coded(g, turned(g))
    return g("MatMul", "x", k), g("MatMul", g("Neg", "x"), k)


SIGNED: dict[str, Build] = {
    "moved once": lambda g: g("MatMul", "x", coded(g, turned(g))),
    "moved four times": moved_twice,
    "read by two products": two_products,
    "behind an op that is no product": lambda g: g(
        "MatMul", "x", coded(g, g("Transpose", g("Add", "x", "x"), perm=[0, 2, 1]))
    ),
}


def other_numbers(g: SmallGraph, scale: float, zero: int) -> str:
    numbers = g.const(SCALE), g.const(np.uint8(100))
    codes = g("QuantizeLinear", turned(g), *numbers)
    return g(
        "MatMul", "x", g("DequantizeLinear", codes, g.const(np.float32(scale)), np.uint8(zero))
    )


def with_reader(g: SmallGraph, place: int) -> Outputs:
    """Something else reads what is moved (0), the codes (1) or the values (2)."""
    numbers = g.const(SCALE), g.const(np.uint8(100))
    moved = turned(g)
    codes = g("QuantizeLinear", moved, *numbers)
    values = g("DequantizeLinear", codes, *numbers)
    read = (moved, codes, values)[place]
    beside = g("DequantizeLinear", codes, *numbers) if place == 1 else g("Relu", read)
    return g("MatMul", "x", values), beside


def shown(g: SmallGraph) -> Outputs:
    values = coded(g, turned(g))
    return g("MatMul", "x", values), values


def of_a_shape_at_run_time(g: SmallGraph) -> str:
    moved = g("Reshape", g("Relu", "x"), g("Shape", turned(g)))
    return g("MatMul", "x", coded(g, moved))


def without_a_zero_point(g: SmallGraph) -> str:
    scale = g.const(SCALE)
    return g("MatMul", "x", g("DequantizeLinear", g("QuantizeLinear", turned(g), scale), scale))


def both_factors(g: SmallGraph) -> str:
    values = coded(g, turned(g))
    return g("MatMul", values, g("Transpose", values, perm=[0, 2, 1]))


PLAIN: dict[str, tuple[str, Build]] = {
    "a scale of each channel": (
        "UINT8",
        lambda g: g(
            "MatMul", "x",
            coded(g, turned(g), np.full(D, 100, np.uint8), np.full(D, 0.05, np.float32)),
        ),
    ),
    "16 bits": ("UINT16", lambda g: g("MatMul", "x", coded(g, turned(g), np.uint16(300)))),
    "int8 before": ("INT8", lambda g: g("MatMul", "x", coded(g, turned(g), np.int8(3)))),
    "another scale behind": ("UINT8", lambda g: other_numbers(g, 0.1, 100)),
    "another zero point behind": ("UINT8", lambda g: other_numbers(g, 0.05, 90)),
    "no zero point": ("UINT8", without_a_zero_point),
    "what is moved is read": ("UINT8", lambda g: with_reader(g, 0)),
    "codes are read": ("UINT8", lambda g: with_reader(g, 1)),
    "values are read": ("UINT8", lambda g: with_reader(g, 2)),
    "values are shown": ("UINT8", shown),
    "the first factor": ("UINT8", lambda g: g("MatMul", coded(g, turned(g)), "x")),
    "both factors": ("UINT8", both_factors),
    "nothing moves": (
        "UINT8",
        lambda g: g("MatMul", g("Transpose", "x", perm=[0, 2, 1]), coded(g, g("Relu", "x"))),
    ),
    "of the input": (
        "UINT8", lambda g: g("MatMul", "x", coded(g, g("Transpose", "x", perm=[0, 2, 1])))
    ),
    "of a product": (
        "UINT8",
        lambda g: g("MatMul", "x", coded(g, g("Transpose", g("MatMul", "x", sample(D, D)),
                                              perm=[0, 2, 1]))),
    ),
    "of a part": (
        "UINT8",
        lambda g: g("MatMul", "x", coded(g, g("Transpose", g("Slice", g("Relu", "x"),
            np.array([0]), np.array([D]), np.array([2])), perm=[0, 2, 1]))),
    ),
    "a shape found at run time": ("UINT8", of_a_shape_at_run_time),
}  # fmt: skip


def types_of_codes(model: ir.Model) -> list[str]:
    """Of what QuantizeLinear makes, and of all that only moves it."""
    found = []
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            codes = node.inputs[0]
            assert codes is not None
            assert codes.dtype is not None
            found.append(codes.dtype.name)
    return found


def codes_of(model: ir.Model) -> list[str | None]:
    """The names of what QuantizeLinear makes."""
    return [n.outputs[0].name for n in model.graph if n.op_type == "QuantizeLinear"]


def build(make: Build) -> ir.Model:
    g = SmallGraph((B, T, D))
    made = make(g)
    return g.model(*([made] if isinstance(made, str) else made))


def numbers_of(model: ir.Model) -> list[np.ndarray[Any, Any]]:
    return run(model, sample(2, T, D, seed=4))


@pytest.mark.parametrize("name", SIGNED)
def test_what_is_only_moved_is_int8(name: str) -> None:
    """128 lower, Q in front of all that moves; the same numbers, and shapes and types that hold."""
    before, after = build(SIGNED[name]), suit_kernels(build(SIGNED[name]))
    assert types_of_codes(after) == ["INT8"]
    (quantize,) = [n for n in after.graph if n.op_type == "QuantizeLinear"]
    source, zero = (quantize.inputs[i] for i in (0, 2))
    assert source is not None
    assert zero is not None
    assert zero.const_value is not None
    assert zero.const_value.numpy() == -28
    assert zero.const_value.dtype == ir.DataType.INT8
    assert source.producer() is not None
    assert source.producer().op_type in ("Relu", "Add")  # type: ignore[union-attr]
    names = [v.name for n in after.graph for v in n.outputs]
    assert len(set(names)) == len(names)
    for node in after.graph:
        if node.op_type in ("Transpose", "Reshape", "Squeeze"):
            made = node.outputs[0]
            assert made.dtype == ir.DataType.INT8
            last = all(use.node.op_type == "DequantizeLinear" for use in made.uses())
            assert made.name in codes_of(before) if last else str(made.name).endswith("_codes")
    for one, other in zip(numbers_of(after), numbers_of(before), strict=True):
        np.testing.assert_array_equal(one, other)
    assert_shapes(after, sample(2, T, D, seed=4))
    read = {v.name for n in after.graph for v in n.inputs if v is not None}
    assert {*after.graph.initializers} <= read
    order = [n.op_type for n in after.graph]
    suit_kernels(after)
    assert [n.op_type for n in after.graph] == order


@pytest.mark.parametrize("name", PLAIN)
def test_near_misses_stay(name: str) -> None:
    kind, make = PLAIN[name]
    before, after = build(make), suit_kernels(build(make))
    assert set(types_of_codes(after)) == {kind}
    assert [n.op_type for n in after.graph] == [n.op_type for n in before.graph]
    for one, other in zip(numbers_of(after), numbers_of(before), strict=True):
        np.testing.assert_array_equal(one, other)


def test_sums_that_no_processor_has_stay_unsigned() -> None:
    assert types_of_codes(suit_kernels(build(SIGNED["moved once"]), signed=False)) == ["UINT8"]


def linear(g: SmallGraph) -> str:
    return g("Add", g("MatMul", "x", sample(D, D, seed=1)), sample(D, seed=2))


def read_twice(g: SmallGraph) -> Outputs:
    made = linear(g)
    return g("Gelu", made), g("Relu", made)


GELUS: dict[str, tuple[int | None, Build]] = {
    "a linear": (2, lambda g: g("Gelu", linear(g))),
    "a linear that is read": (1, read_twice),
    "an Add": (2, lambda g: g("Gelu", g("Add", g("Relu", "x"), sample(D)))),
    "an Add, the bias first": (2, lambda g: g("Gelu", g("Add", sample(D), g("Relu", "x")))),
    "an Add of a matrix": (2, lambda g: g("Gelu", g("Add", g("Relu", "x"), sample(T, D)))),
    "an Add of a number": (0, lambda g: g("Gelu", g("Add", g("Relu", "x"), np.float32(2)))),
    "another op, earlier by name": (1, lambda g: g("Abs", linear(g))),
    "another op, later by name": (1, lambda g: g("Relu", linear(g))),
    "no Add": (None, lambda g: g("Gelu", g("Mul", "x", sample(D)))),
    "the input": (None, lambda g: g("Gelu", "x")),
}


@pytest.mark.parametrize("name", GELUS)
def test_a_bias_vector_in_front_of_gelu_has_two_axes(name: str) -> None:
    """Its own Add in place of a linear's third input, in the linear's place."""
    rank, make = GELUS[name]
    before, after = build(make), build(make)
    fuse(after)
    shape = after.graph.outputs[0].shape
    suited = to_standard(suit_kernels(after))
    found = [v for n in suited.graph if n.op_type == "Add" for v in n.inputs]
    ranks = [v.const_value.numpy().ndim for v in found if v is not None and v.const_value]
    assert ranks == ([] if rank is None else [rank])
    assert suited.graph.outputs[0].shape == shape
    for one, other in zip(numbers_of(suited), numbers_of(before), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    assert_shapes(suited, sample(2, T, D, seed=4))


@pytest.mark.parametrize(
    ("least", "most", "stored"), [(-8, 7, 1), (0, 0, 1), (-9, 7, 0), (-8, 8, 0)]
)
def test_codes_from_minus_8_to_7_are_int4(least: int, most: int, stored: int) -> None:
    """Only constants of int8; an empty one holds no more either."""
    codes = np.array([[least, most], [0, 0]], np.int8)
    g = SmallGraph((3, 2))
    scale = g.const(np.float32(0.5))
    unsigned = g("DequantizeLinear", np.array([[1, 2], [3, 4]], np.uint8), scale)
    empty = g("DequantizeLinear", np.zeros((2, 0), np.int8), scale)
    made = [g("DequantizeLinear", codes, scale), unsigned, empty]
    model = g.model(*(g("MatMul", "x", w) for w in made), coded(g, "x", np.int8(0)))
    before = run(model, sample(3, 2))
    assert store_in_four_bits(model) == stored + 1
    kinds = [v.const_value.dtype.name for v in model.graph.initializers.values() if v.const_value]
    assert kinds.count("INT4") == stored + 1
    for one, other in zip(run(model, sample(3, 2)), before, strict=True):
        np.testing.assert_array_equal(one, other)
    for value in model.graph.initializers.values():
        held = value.const_value
        if held is not None and held.dtype == ir.DataType.INT4 and held.size:
            np.testing.assert_array_equal(held.numpy().astype(np.int8), codes)
            assert held.numpy().dtype == ml_dtypes.int4
