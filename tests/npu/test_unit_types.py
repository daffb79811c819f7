"""One type of codes in every unit, and the numbers of what stands beside activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run, sample

from ptq_onnx.qdq.unit_numbers import Numbers, derived, is_data, joined, kept, numbers_of
from ptq_onnx.qdq.units import complete
from ptq_onnx.targets.checking.coding import Coding

UINT8, UINT16 = ir.DataType.UINT8, ir.DataType.UINT16
TYPE: dict[int, Any] = {8: np.uint8, 16: np.uint16}


def coded(g: SmallGraph, x: str, bits: int, span: float = 8.0) -> str:
    """Codes of -span/2 … span/2."""
    scale = g.const(np.float32(span / (2**bits - 1)))
    zero = g.const(TYPE[bits](2 ** (bits - 1)))
    return g("DequantizeLinear", g("QuantizeLinear", x, scale, zero), scale, zero)


def bits_of(value: ir.Value | None) -> int:
    numbers = None if value is None else numbers_of(value)
    assert numbers is not None
    return {UINT8: 8, UINT16: 16}[numbers.dtype]


@pytest.mark.parametrize("op", ["MatMul", "Add"])
@pytest.mark.parametrize("bits", [(8, 8, 8), (8, 8, 16), (16, 8, 8), (8, 16, 8), (16, 16, 8)])
def test_all_of_a_unit_is_as_wide_as_the_widest(op: str, bits: tuple[int, int, int]) -> None:
    """But for the second factor of a product, which may be narrower; nothing is rounded anew."""
    g = SmallGraph((1, 4, 4))
    one, other = coded(g, "x", bits[0]), coded(g, g("Transpose", "x", perm=[0, 2, 1]), bits[1])
    made = g(op, one, other)
    model = g.model(coded(g, made, bits[2], span=64.0))
    plain = model.clone()
    assert complete(model) == []
    (node,) = [n for n in model.graph if n.op_type == op]
    wide = max(bits)
    assert bits_of(node.inputs[0]) == wide
    assert bits_of(node.inputs[1]) == (bits[1] if op == "MatMul" else wide)
    (quantize,) = [use.node for use in node.outputs[0].uses()]
    assert Coding(quantize).dtype == (UINT16 if wide == 16 else UINT8)
    x = sample(1, 4, 4)
    step = 64 / (2 ** bits[2] - 1)
    np.testing.assert_allclose(run(model, x)[0], run(plain, x)[0], atol=1.01 * step)


@pytest.mark.parametrize(
    ("array", "low", "high"),
    [([2.0, 3.0], 0, 3), ([0.25, 0.5], 0, 0.5), ([-3.0, -2.0], -3, 0), ([-0.5, -0.25], -0.5, 0),
     ([-1.0, 2.0], -1, 2), ([0.0, 4.0], 0, 4), ([0.0, 0.0], 0, 0)],
)  # fmt: skip
def test_codes_of_a_constant_hold_it_and_zero(array: list[float], low: float, high: float) -> None:
    """255 steps from its least to its largest number, zero being one of them."""
    g = SmallGraph((1, 4, 2))
    model = g.model(coded(g, g("Add", coded(g, "x", 8), np.float32(array)), 8, span=16.0))
    assert complete(model) == []
    (node,) = [n for n in model.graph if n.op_type == "Add"]
    found = Coding(node.inputs[1].producer())  # type: ignore[union-attr]
    assert found.dtype == UINT8
    assert float(found.scale) == pytest.approx((high - low) / 255 if high > low else 1, rel=1e-6)
    zero = round(-low / ((high - low) / 255)) if high > low else 0
    assert int(found.zero_point) == zero
    codes = found.node.inputs[0].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    np.testing.assert_allclose((codes - zero) * found.scale, array, atol=0.51 * found.scale)


def test_ranges_that_are_joined() -> None:
    """One is itself; of more, from the least end to the largest, as wide as the widest."""
    first, second, third = (
        Numbers(np.float32(0.01), 0, UINT8),
        Numbers(np.float32(0.02), 255, UINT8),
        Numbers(np.float32(0.001), 1000, UINT16),
    )
    assert joined([first]) == first
    assert joined([]) is None
    for parts in ([first, second], [second, first], [first, first, second], [second, first, first]):
        found = joined(parts)
        assert found is not None
        assert (found.dtype, found.zero) == (UINT8, 170)
        assert found.scale == pytest.approx((2.55 + 5.1) / 255)
    found = joined([first, second, third])
    assert found is not None
    assert found.dtype == UINT16
    assert found.range == pytest.approx((-5.1, 64.535), abs=2e-3)


def test_numbers_that_follow_from_what_an_op_reads() -> None:
    """A positive factor is a factor of the scale, a sigmoid lies from 0 to 1; others tell none."""
    g = SmallGraph((1, 4))
    x = coded(g, "x", 8, span=2.55)
    names = {
        "twice": g("Mul", x, np.float32(2)),
        "less": g("Mul", x, np.float32(-2)),
        "none": g("Mul", x, np.float32(0)),
        "each": g("Mul", x, np.ones(4, np.float32)),
        "sum": g("Add", x, np.float32(2)),
        "sigmoid": g("Sigmoid", x),
        "moved": g("Reshape", x, np.array([4, 1])),
        "float": g("Sigmoid", g("Exp", x)),
    }
    model = g.model(*names.values())
    nodes = {str(n.outputs[0].name): n for n in model.graph}
    found = {name: derived(nodes[tensor]) for name, tensor in names.items()}
    assert found["twice"] == Numbers(np.float32(np.float32(0.01) * 2), 128, UINT8)
    assert found["sigmoid"] == Numbers(np.float32(1 / 255), 0, UINT8)
    assert {n for n, numbers in found.items() if numbers is None} == {
        "less", "none", "each", "sum", "moved", "float"
    }  # fmt: skip
    assert derived(None) is None
    read = numbers_of(nodes[names["moved"]].inputs[0])  # type: ignore[arg-type]
    assert kept(nodes[names["moved"]]) == read
    assert read is not None


def test_a_concat_keeps_the_range_of_all_that_it_joins() -> None:
    g = SmallGraph((1, 4))
    one, other = coded(g, "x", 8, span=2.0), coded(g, g("Neg", "x"), 8, span=4.0)
    both = g("Concat", one, other, axis=1)
    model = g.model(both, g("Concat", one, one, axis=1), g("Concat", one, "x", axis=1))
    nodes = {str(n.outputs[0].name): n for n in model.graph}
    found = [kept(nodes[str(v.name)]) for v in model.graph.outputs]
    one_s, other_s = (numbers_of(nodes[name].outputs[0]) for name in (one, other))
    assert one_s is not None
    assert other_s is not None
    assert found[0] == joined([one_s, other_s])
    assert found[0] != other_s or found[0].range == other_s.range
    assert found[1] == one_s
    assert found[2] == one_s


def test_activations_are_what_no_constants_make() -> None:
    """Whatever stands first among an op's inputs; a constant's own DequantizeLinear is none."""
    g = SmallGraph((1, 4))
    ones = np.ones(4, np.float32)
    names = [g("Mul", ones, "x"), g("Add", ones, "x"), g("Add", "x", "x"), coded(g, "x", 8)]
    scale, zero = g.const(np.float32(0.1)), g.const(np.uint8(3))
    held = g("DequantizeLinear", g.const(np.arange(4, dtype=np.uint8)), scale, zero)
    shape = g("Shape", "x")
    model = g.model(*names, g("Add", "x", held))
    nodes = {str(n.outputs[0].name): n for n in model.graph}
    assert all(is_data(nodes[name].outputs[0]) for name in names)
    assert is_data(model.graph.inputs[0])
    assert not is_data(nodes[held].outputs[0])
    assert not is_data(model.graph.initializers[scale])
    assert not is_data(nodes[shape].outputs[0])  # whole numbers
    assert not is_data(None)


@pytest.mark.parametrize("scales", [1, 3])
def test_a_bias_of_more_than_32_bits_makes_its_weight_s_steps_larger(scales: int) -> None:
    """The weight's values stay, to half of the larger step, and the bias fits."""
    g = SmallGraph((1, 5, 4))
    step = np.full(3, 1e-7, np.float32)
    step[-1] = 1e-3  # of this channel the bias fits
    step = step if scales == 3 else step[:1].reshape(())
    codes = np.random.default_rng(0).integers(-127, 128, (4, 3)).astype(np.int8)
    zero = np.zeros(step.shape, np.int8)
    axis = {"axis": 1} if scales == 3 else {}
    weight = g("DequantizeLinear", g.const(codes), g.const(step), g.const(zero), **axis)
    bias = np.float32([30.0, -70.0, 50.0])
    read = coded(g, "x", 8, span=2.55)
    model = g.model(coded(g, g("Linear", read, weight, bias, domain="ptq_onnx"), 8, span=200.0))
    for node in model.graph:
        if node.op_type == "Linear":
            node.outputs[0].shape = ir.Shape([1, 5, 3])
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    assert complete(model) == []
    (node,) = [n for n in model.graph if n.op_type == "Linear"]
    made, held = (Coding(v.producer()) for v in node.inputs[1:])  # type: ignore[union-attr]
    new = np.broadcast_to(made.scale, (3,))
    wanted = np.maximum(np.broadcast_to(step, (3,)), np.abs(bias) / (2.0**31 - 1) / 0.01)
    wanted = wanted if scales == 3 else np.full(3, wanted.max())
    np.testing.assert_allclose(new, wanted, rtol=1e-5)
    values = made.node.inputs[0].const_value.numpy() * new  # type: ignore[union-attr]
    assert (np.abs(values - codes * np.float64(step)) <= 0.5001 * new).all()
    shifted = held.node.inputs[0].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    assert held.dtype == ir.DataType.INT32
    np.testing.assert_allclose(shifted * held.scale, bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [(8, 8), (8, 16), (16, 16)])
def test_bounds_and_scales_are_no_data(bits: tuple[int, int]) -> None:
    """Of a Clip, and of a Resize that overshoots: what they read is as wide as what they make, and
    their other inputs stay floats."""
    for op in ("Clip", "Resize"):
        g = SmallGraph((1, 2, 4, 4))
        others = (
            ["", np.float32([1, 1, 2, 2])] if op == "Resize" else [np.float32(-1), np.float32(2)]
        )
        more = {"mode": "cubic"} if op == "Resize" else {}
        model = g.model(coded(g, g(op, coded(g, "x", bits[0]), *others, **more), bits[1]))
        assert complete(model) == []
        (node,) = [n for n in model.graph if n.op_type == op]
        assert bits_of(node.inputs[0]) == max(bits)
        held = [v.const_value for v in node.inputs[1:] if v is not None]
        assert all(v is not None and v.dtype == ir.DataType.FLOAT for v in held)
        assert len(held) == (1 if op == "Resize" else 2)


def linear_of(codes: np.ndarray, scale: np.ndarray) -> ir.Model:
    """x on codes → a linear of those codes of a weight [4, 3], with a scale for each column → on
    codes."""
    g = SmallGraph((1, 5, 4))
    zero = g.const(np.zeros(scale.shape, codes.dtype))
    axis = {"axis": 1} if scale.ndim else {}
    weight = g("DequantizeLinear", g.const(codes), g.const(scale), zero, **axis)
    made = g("Linear", coded(g, "x", 8), weight, domain="ptq_onnx")
    model = g.model(coded(g, made, 8))
    (node,) = [n for n in model.graph if n.op_type == "Linear"]
    node.outputs[0].shape, node.outputs[0].type = (
        ir.Shape([1, 5, 3]),
        ir.TensorType(ir.DataType.FLOAT),
    )
    return model


@pytest.mark.parametrize(
    ("least", "most", "scales", "kind"),
    [(-8, 7, 3, "INT4"), (0, 7, 3, "INT4"), (-8, 0, 3, "INT4"), (-9, 7, 3, "INT8"),
     (-8, 8, 3, "INT8"), (-8, 7, 0, "INT8")],
)  # fmt: skip
def test_weights_that_four_bits_hold(least: int, most: int, scales: int, kind: str) -> None:
    """From -8 to 7, with a scale for each output channel."""
    codes = np.zeros((4, 3), np.int8)
    codes[0, 0], codes[1, 2] = least, most
    model = linear_of(codes, np.full(3, 0.1, np.float32) if scales else np.float32(0.1))
    assert complete(model) == []
    (node,) = [n for n in model.graph if n.op_type == "Linear"]
    weight = node.inputs[1].producer()  # type: ignore[union-attr]
    held = [v.const_value for v in (weight.inputs[0], weight.inputs[2])]  # type: ignore[union-attr]
    assert {v.dtype.name for v in held if v is not None} == {kind}
    np.testing.assert_array_equal(held[0].numpy().astype(np.int8), codes)  # type: ignore[union-attr]


@pytest.mark.parametrize("shown", [True, False])
def test_a_reader_beside_a_quantizer_reads_codes_too(shown: bool) -> None:
    """And what is an output of the graph is what the codes hold."""
    g = SmallGraph((1, 4))
    made = g("Neg", coded(g, "x", 8))
    outputs = [coded(g, g("Abs", coded(g, made, 8)), 8)]
    outputs += [made] if shown else [coded(g, g("Relu", made), 8)]
    model = g.model(*outputs)
    plain = model.clone()
    assert complete(model) == []
    for node in model.graph:
        if node.op_type in ("Abs", "Relu"):
            assert bits_of(node.inputs[0]) == 8
    last = model.graph.outputs[1].producer()
    assert last is not None
    assert last.op_type == "DequantizeLinear"
    assert [v.name for v in model.graph.outputs] == [v.name for v in plain.graph.outputs]
    x = sample(1, 4)
    for found, expected in zip(run(model, x), run(plain, x), strict=True):
        np.testing.assert_allclose(found, expected, atol=8 / 255)


@pytest.mark.parametrize("coded_behind", [True, False])
def test_all_that_is_joined_has_the_numbers_of_the_whole(coded_behind: bool) -> None:
    """Tensors of other ranges are converted, a constant gets codes of that range; without codes
    behind it, the range holds the tensors that are joined."""
    g = SmallGraph((1, 4))
    one, other = coded(g, "x", 8, span=2.0), coded(g, g("Neg", "x"), 8, span=4.0)
    joined_all = g("Concat", one, np.float32([[0.25, -1.0]]), other, one, axis=1)
    out = coded(g, joined_all, 8, span=6.0) if coded_behind else joined_all
    model = g.model(coded(g, g("Relu", out), 8))
    plain = model.clone()
    assert complete(model) == []
    (concat,) = [n for n in model.graph if n.op_type == "Concat"]
    found = {numbers_of(value) for value in concat.inputs}
    quantizers = {Numbers.of(use.node) for use in concat.outputs[0].uses()}
    assert len(found) == 1
    assert found == quantizers
    (numbers,) = found
    assert numbers is not None
    ends = (-3, 3) if coded_behind else (-2, 2)
    assert numbers.range == pytest.approx(ends, abs=0.03)
    x = sample(1, 4) / 3
    np.testing.assert_allclose(run(model, x)[0], run(plain, x)[0], atol=3 * 8 / 255)


def test_units_with_a_float_or_without_data_are_left_alone() -> None:
    """Nothing is converted beside what has no numbers, and constants alone get no codes."""
    g = SmallGraph((1, 4))
    one, rest = coded(g, "x", 8), g("Exp", "x")
    beside = coded(g, g("Add", one, rest), 16, span=64.0)
    alone = coded(g, g("Sub", np.full((1, 4), 2.0), np.ones((1, 4))), 8)
    model = g.model(beside, alone)
    assert complete(model) == ["Exp"]
    nodes = {n.op_type: n for n in model.graph}
    assert bits_of(nodes["Add"].inputs[0]) == 8
    assert [v.const_value is not None for v in nodes["Sub"].inputs if v is not None] == [True] * 2
