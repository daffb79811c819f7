"""What lowering writes in small graphs: to the last bit what the specs say, with true shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, assert_shapes, run, sample
from test_factors import exact

from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.numerics.around.run_time import RunTimeRange
from ptq_onnx.numerics.fake_quantize import fake_quantize
from ptq_onnx.numerics.grain import PerChannel, PerTensor, PowersOfTwo
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.qdq.factors import plan_factors
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.qdq.nodes import Nodes
from ptq_onnx.qdq.small_scales import enlarge_small_scales, power_of_two
from ptq_onnx.qdq.sums import sums_to_means

B = "batch"
POWERS = np.float32([1, 2, 4, 1, 8, 2, 1, 4])


def activation(name: str, factor: Any = None, scale: float = 0.05, zero: int = 120) -> TensorSpec:
    grain = PerTensor() if factor is None else PowersOfTwo()
    rule = Rule(8, False, False, grain)
    array = None if factor is None else np.asarray(factor, np.float32)
    return TensorSpec(name, rule, np.float32(scale), np.int32(zero), factor=array)


def weight(name: str, columns: int, axis: int = 1, factor: Any = None) -> TensorSpec:
    """Codes of a scale per output channel, or of one (``columns`` 0)."""
    scale = np.float32(0.02) if not columns else np.linspace(0.01, 0.03, columns, dtype=np.float32)
    zero = np.zeros(np.shape(scale), np.int32)
    rule = Rule(8, grain=PerChannel() if columns else PerTensor())
    array = None if factor is None else np.asarray(factor, np.float32)
    return TensorSpec(name, rule, scale, zero, axis if columns else None, array)


def linear(shape: tuple[Any, ...], bias: bool = True) -> ir.Model:
    g = SmallGraph(shape)
    y = g("MatMul", g("Relu", "x"), g.const(sample(8, 3), "w"))
    y = g("Add", y, g.const(sample(3, seed=1), "b")) if bias else y
    model = g.model(g("Relu", y))
    fuse(model)
    return model


def node_of(model: ir.Model, op: str) -> ir.Node:
    (node,) = [n for n in model.graph if n.op_type == op]
    return node


@pytest.mark.parametrize(
    ("shape", "rank"), [((B, 4, 8), 1), ((2, 4, 8), 3), ((2, 8), 1), ((2, 3, 4, 8), 4)]
)
def test_a_bias_has_the_rank_of_a_fixed_output(shape: tuple[Any, ...], rank: int) -> None:
    """Where all sizes are fixed and there are more than two, or the runtime makes a float Gemm."""
    lowered = lower(linear(shape), {"relu0": activation("relu0"), "w": weight("w", 3)})
    bias = node_of(lowered, "Linear").inputs[2].const_value.numpy()  # type: ignore[union-attr]
    assert bias.shape == (1,) * (rank - 1) + (3,)
    x = sample(*(2 if d == B else d for d in shape), seed=3)
    expected = fake_quantize(np.maximum(x, 0), activation("relu0")) @ fake_quantize(
        sample(8, 3), weight("w", 3)
    ) + sample(3, seed=1)
    np.testing.assert_allclose(run(lowered, x)[0], np.maximum(expected, 0), rtol=1e-4, atol=1e-5)
    assert_shapes(lowered, x)


@pytest.mark.parametrize("columns", [3, 0])
@pytest.mark.parametrize("coded", [True, False])
def test_the_axis_is_that_of_several_scales(columns: int, coded: bool) -> None:
    """One scale has none; a float product has the codes by one, and the scales in a Mul."""
    specs = {"w": weight("w", columns)} | ({"relu0": activation("relu0")} if coded else {})
    lowered = lower(linear((B, 4, 8)), specs)
    found = node_of(lowered, "Linear").inputs[1].producer()  # type: ignore[union-attr]
    assert found is not None
    if not coded:
        assert found.op_type == "Mul"
        scale = found.inputs[1].const_value.numpy()  # type: ignore[union-attr]
        np.testing.assert_array_equal(scale, specs["w"].scale)
        found = found.inputs[0].producer()  # type: ignore[union-attr]
        assert found.inputs[1].const_value.numpy() == 1  # type: ignore[union-attr]
        assert found.inputs[1].const_value.numpy().ndim == 0  # type: ignore[union-attr]
    assert found.op_type == "DequantizeLinear"  # type: ignore[union-attr]
    attributes = {a.name: a.value for a in found.attributes.values()}  # type: ignore[union-attr]
    assert attributes == ({"axis": 1} if columns and coded else {})
    zero, scale = (found.inputs[i].const_value.numpy() for i in (2, 1))  # type: ignore[union-attr]
    assert zero.shape == scale.shape
    assert zero.dtype == np.int8


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("coded", [True, False])
def test_factors_in_the_columns_that_make_a_tensor(bias: bool, coded: bool) -> None:
    """Its weight and bias are divided, in codes by their scales, else as they are."""
    g = SmallGraph((4, 6, 8))
    y = g("MatMul", "x", g.const(sample(8, 8), "w"))
    y = g("Add", y, sample(8, seed=1)) if bias else y
    model = g.model(g("Relu", y))
    fuse(model)
    (made,) = [n.outputs[0].name for n in model.graph if is_linear(n)]
    specs = [activation(str(made), POWERS), *([weight("w", 8), activation("x")] if coded else [])]
    exact(model, specs)
    place = next(iter(plan_factors(model.graph, {s.tensor: s for s in specs}).places.values()))
    assert place.before == "columns"
    assert str(place).startswith(f"{made}: 1/f into the columns of")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("coded", [True, False])
def test_factors_in_the_channels_of_a_convolution(bias: bool, coded: bool) -> None:
    g = SmallGraph((2, 4, 6, 5))
    inputs = [g.const(sample(8, 4, 3, 3) * 0.3, "w"), *([sample(8, seed=1)] if bias else [])]
    model = g.model(g("Relu", g("Conv", "x", *inputs)))
    factor = POWERS.reshape(8, 1, 1)
    specs = [activation("conv0", factor), *([weight("w", 8, 0), activation("x")] if coded else [])]
    lowered = exact(model, specs, (2, 4, 6, 5))
    assert_shapes(lowered, sample(2, 4, 6, 5))
    plan = plan_factors(model.graph, {s.tensor: s for s in specs})
    assert [p.before for p in plan.places.values()] == ["columns"]


def attention() -> SmallGraph:
    g = SmallGraph((2, 3, 8))
    q, k = g("Relu", "x"), g("Transpose", g("Neg", "x"), perm=[0, 2, 1])
    g("Softmax", g("MatMul", q, k), axis=-1)
    return g


def test_only_both_sides_of_a_product_cancel() -> None:
    """A factor of q alone is given back before the product; two that do not cancel are, too."""
    for factors in ((POWERS, None), (None, 1 / POWERS[:, None]), (POWERS, POWERS[:, None]),
                    (POWERS, 1 / POWERS[:, None])):  # fmt: skip
        g = attention()
        model = g.model("softmax4")
        specs = [activation("relu0", factors[0]), activation("transpose2", factors[1])]
        exact(model, specs, (2, 3, 8))
        plan = plan_factors(model.graph, {s.tensor: s for s in specs})
        both = factors[0] is not None and factors[1] is not None
        opposite = both and bool(np.all(factors[0] * factors[1].ravel() == 1))  # type: ignore
        for place in plan.places.values():
            assert list(place.behind.values()) == (["opposite"] if opposite else [])
            assert len(place.rescaled) == (0 if opposite else 1)


def test_what_is_coded_again_on_the_way_takes_no_factor() -> None:
    """A tensor, and what layout ops make of it, with factors of their own in front of a linear."""
    for again in (True, False):
        g = SmallGraph((4, 6, 8))
        y = g("Reshape", g("Relu", "x"), np.array([0, 3, 2, 8]))
        y = g("MatMul", y, g.const(sample(8, 5), "w"))
        model = g.model(g("Add", y, sample(5, seed=1)))
        fuse(model)
        specs = [activation("relu0", POWERS), weight("w", 5, factor=1 / POWERS[:, None])]
        specs += [activation("reshape1", POWERS, 0.06)] if again else []
        exact(model, specs)
        place = plan_factors(model.graph, {s.tensor: s for s in specs}).places
        first = next(p for v, p in place.items() if v.name == "relu0")
        assert list(first.behind.values()) == ([] if again else ["rows"])


def test_codes_once_more_behind_a_cut_of_codes_alone() -> None:
    """A convolution that reads a part of a coded tensor has Q and DQ of its own; of a float one
    not."""
    for name in ("relu0", "add0"):
        g = SmallGraph((2, 8, 4, 4))
        y = g("Relu", "x") if name == "relu0" else g("Add", "x", "x")
        first = g("Split", y, np.array([4, 4]), axis=1, outputs=2)
        out = g("Conv", first, g.const(sample(4, 4, 1, 1), "w"))
        model = g.model(g("Concat", out, f"{first}_1", axis=1))
        specs = [weight("w", 4, 0), *([activation("relu0")] if name == "relu0" else [])]
        lowered = exact(model, specs, (2, 8, 4, 4))
        count = sum(n.op_type == "QuantizeLinear" for n in lowered.graph)
        assert count == (2 if name == "relu0" else 0)


def test_codes_once_where_nothing_is_cut() -> None:
    """Straight from a coded tensor, or behind a Reshape of it."""
    for steps in (0, 1):
        g = SmallGraph((2, 8, 4, 4))
        y = g("Relu", "x")
        y = g("Reshape", y, np.array([2, 8, 2, 8])) if steps else y
        model = g.model(g("Conv", y, g.const(sample(4, 8, 1, 1), "w")))
        lowered = exact(model, [weight("w", 4, 0), activation("relu0")], (2, 8, 4, 4))
        assert sum(n.op_type == "QuantizeLinear" for n in lowered.graph) == 1


def test_every_sum_that_is_scaled_is_a_mean() -> None:
    """Whatever stands before: a sum that is not scaled, one of unknown axes."""
    g = SmallGraph((2, 3, 4))
    plain = g("ReduceSum", "x", np.array([1]))
    other = g("Mul", g("ReduceSum", "x", np.array([0])), "x")
    halves = g("Mul", g("ReduceSum", "x", np.array([1, 2])), np.array(0.5))
    third = g("Mul", np.array(0.25), g("ReduceSum", "x", np.array([-1]), keepdims=0))
    model = g.model(g("Neg", plain), halves, third, other)
    expected = run(model, sample(2, 3, 4))
    assert sums_to_means(model.graph) == 2
    for found, wanted in zip(run(model, sample(2, 3, 4)), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    factors = [
        float(v.const_value.numpy())
        for n in model.graph if n.op_type == "Mul"
        for v in n.inputs if v is not None and v.const_value is not None
    ]  # fmt: skip
    assert factors == [6.0, 1.0]
    assert_shapes(model, sample(2, 3, 4))


def test_factors_of_small_scales() -> None:
    """The least power of two with which 2^-14 is reached; none for zero."""
    scale = np.float32([2.0**-14, 2.0**-15, 1.1 * 2.0**-16, 0.9 * 2.0**-16, 1.0, 0.0])
    np.testing.assert_array_equal(power_of_two(scale), [1, 2, 4, 8, 1, 1])


def test_small_scales_behind_others_grow_too() -> None:
    """A weight of large scales first, one that is no product's, then a small one."""
    g = SmallGraph((2, 8))
    tiny = np.full(4, 2.0**-17, np.float32)

    def coded(scale: Any, seed: int, rows: int, columns: int) -> str:
        codes = np.random.default_rng(seed).integers(-128, 128, (rows, columns)).astype(np.int8)
        return g("DequantizeLinear", g.const(codes), scale, np.zeros(np.shape(scale), np.int8),
                 axis=1)  # fmt: skip

    y = g("MatMul", "x", coded(np.full(8, 0.1, np.float32), 0, 8, 8))
    y = g("Add", y, coded(np.full(8, 2.0**-17, np.float32), 1, 2, 8))
    model = g.model(g("MatMul", y, coded(tiny, 2, 8, 4)))
    expected = run(model, sample(2, 8))[0]
    assert enlarge_small_scales(model.graph) == 1
    np.testing.assert_array_equal(run(model, sample(2, 8))[0], expected)
    scales = [
        n.inputs[1].const_value.numpy() for n in model.graph if n.op_type == "DequantizeLinear"
    ]  # type: ignore[union-attr]
    assert [float(s.min()) for s in scales] == pytest.approx([0.1, 2.0**-17, 2.0**-14])


def test_names_are_not_taken_twice() -> None:
    model = linear((B, 4, 8))
    nodes = Nodes(model.graph, names={"a", "a_1"})
    assert [nodes.unique("a"), nodes.unique("a"), nodes.unique("b")] == ["a_2", "a_3", "b"]
    assert nodes.constant("b", np.float32(2)).name == "b_1"
    lowered = lower(model, {"relu0": activation("relu0"), "w": weight("w", 3)})
    names = [v.name for n in lowered.graph for v in n.outputs] + list(lowered.graph.initializers)
    assert len(names) == len(set(names))
    assert not [n for n, v in lowered.graph.initializers.items() if not v.uses()]


def plan_of(model: ir.Model, specs: list[TensorSpec], tensor: str) -> Any:
    places = plan_factors(model.graph, {s.tensor: s for s in specs}).places
    return next(p for v, p in places.items() if v.name == tensor)


@pytest.mark.parametrize(
    ("cut", "before"),
    [((0, 4, 4, 8), "columns"), ((0, 5, 4, 8), "mul"), ((4, 8, 0, 4), "columns")],
)
@pytest.mark.parametrize("reader", ["Relu", "output", "coded"])
def test_columns_that_nothing_else_reads(
    cut: tuple[int, int, int, int], before: str, reader: str
) -> None:
    """Of two parts of a linear's output one has factors; they overlap or not. The other part is
    read, given out, or has codes of its own."""
    g = SmallGraph((4, 6, 8))
    y = g("Add", g("MatMul", "x", g.const(sample(8, 8), "w")), sample(8, seed=1))
    one, other = (
        g("Slice", y, np.array([a]), np.array([b]), np.array([2])) for a, b in (cut[:2], cut[2:])
    )
    outputs = [g("Relu", one), other if reader == "output" else g("Relu", other)]
    model = g.model(*outputs)
    fuse(model)
    factor = POWERS[: cut[1] - cut[0]]
    specs = [activation(one, factor), *([activation(other)] if reader == "coded" else [])]
    exact(model, specs)
    assert plan_of(model, specs, one).before == before


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_readers_behind_layout_ops(shown: bool, shared: bool) -> None:
    """A linear takes the tensor divided by f behind a Reshape; where another op reads that, or it
    is an output, the linear gets a Reshape of its own."""
    g = SmallGraph((4, 6, 8))
    y = g("Reshape", g("Relu", "x"), np.array([0, 3, 2, 8]))
    out = g("Add", g("MatMul", y, g.const(sample(8, 5), "w")), sample(5, seed=1))
    more = [g("Neg", y)] if shared else []
    model = g.model(out, *more, *([y] if shown else []))
    fuse(model)
    specs = [activation("relu0", POWERS), weight("w", 5, factor=1 / POWERS[:, None])]
    lowered = exact(model, specs)
    place = plan_of(model, specs, "relu0")
    assert list(place.behind.values()) == ["rows"]
    assert len(place.scaled) == (0 if shared or shown else 1)
    assert [n.op_type for n, _ in place.rescaled] == (["Neg"] if shared else [])
    assert sum(n.op_type == "Reshape" for n in lowered.graph) == (2 if shared or shown else 1)
    assert_shapes(lowered, sample(4, 6, 8))


def test_weights_in_blocks_and_rows_that_vary() -> None:
    """Factors that differ over the tokens stay where they are, on either side."""
    g = SmallGraph((4, 6, 8))
    y = g("Add", g("MatMul", "x", g.const(sample(8, 8), "w")), sample(8, seed=1))
    model = g.model(g("Relu", y))
    fuse(model)
    (made,) = [n.outputs[0].name for n in model.graph if is_linear(n)]
    rows = np.exp2(np.arange(6) % 3).astype(np.float32).reshape(6, 1)
    specs = [activation(str(made), rows), weight("w", 8), activation("x")]
    exact(model, specs)
    assert plan_of(model, specs, str(made)).before == "mul"
    assert str(plan_of(model, specs, str(made))) == f"{made}: 1/f by a Mul; f by a Mul for /relu2"


def test_readers_of_a_convolution_behind_an_op_that_others_share() -> None:
    """A linear takes the factor behind a Transpose of its own, a Relu behind the one that was; the
    tensor is coded once."""
    g = SmallGraph((2, 4, 6, 5))
    made = g("Conv", "x", g.const(sample(8, 4, 3, 3) * 0.3, "w"))
    turned = g("Transpose", made, perm=[0, 2, 3, 1])
    out = g("Add", g("MatMul", turned, g.const(sample(8, 5), "v")), sample(5, seed=1))
    model = g.model(out, g("Relu", turned))
    fuse(model)
    factor = POWERS.reshape(8, 1, 1)
    specs = [activation(made, factor), weight("v", 5, factor=1 / POWERS[:, None])]
    lowered = exact(model, specs, (2, 4, 6, 5))
    (place,) = plan_factors(model.graph, {s.tensor: s for s in specs}).places.values()
    assert list(place.behind.values()) == ["rows"]
    assert sum(n.op_type == "QuantizeLinear" for n in lowered.graph) == 1
    assert sum(n.op_type == "Transpose" for n in lowered.graph) == 2


def test_a_range_found_at_run_time_is_that_of_the_standard() -> None:
    """Codes, scale and zero point of one DynamicQuantizeLinear, in their places and types."""
    g = SmallGraph((2, 6, 8))
    model = g.model(g("Neg", g("Relu", "x")))
    rule = Rule(8, False, False, around=(RunTimeRange(),))
    spec = TensorSpec("relu0", rule, np.float32(1 / 255), np.int32(0))
    lowered, x = lower(model, {"relu0": spec}), sample(2, 6, 8)
    dynamic, dequantize = (
        node_of(lowered, op) for op in ("DynamicQuantizeLinear", "DequantizeLinear")
    )
    assert [v.dtype.name for v in dynamic.outputs if v.dtype] == ["UINT8", "FLOAT", "UINT8"]
    assert list(dequantize.inputs) == list(dynamic.outputs)
    expected = -fake_quantize(np.maximum(x, 0), spec)
    np.testing.assert_allclose(run(lowered, x)[0], expected, rtol=1e-6, atol=1e-6)
    assert_shapes(lowered, x)


def test_scales_of_codes_that_are_all_zero_need_no_product() -> None:
    """A channel that holds nothing takes any scale: nothing is divided behind it then."""
    g = SmallGraph((2, 8))
    codes = np.arange(1, 25, dtype=np.int8).reshape(8, 3)
    codes[:, 1] = 0
    scale = np.float32([0.1, 1e-9, 0.2])
    held = [g.const(codes), g.const(scale), g.const(np.zeros(3, np.int8))]
    model = g.model(g("MatMul", "x", g("DequantizeLinear", *held, axis=1)))
    expected = run(model, sample(2, 8))[0]
    assert enlarge_small_scales(model.graph) == 0
    assert [n.op_type for n in model.graph] == ["DequantizeLinear", "MatMul"]
    found = node_of(model, "DequantizeLinear").inputs[1].const_value.numpy()  # type: ignore
    np.testing.assert_array_equal(found, np.float32([0.1, 2.0**-14, 0.2]))
    np.testing.assert_array_equal(run(model, sample(2, 8))[0], expected)


@pytest.mark.parametrize("beta", [True, False])
def test_factors_in_a_norm_with_or_without_a_shift(beta: bool) -> None:
    """γ, and β where there is one, are divided."""
    g = SmallGraph((4, 6, 8))
    more = [sample(8, seed=2)] if beta else []
    made = g("LayerNormalization", "x", sample(8, seed=1), *more, axis=-1)
    model = g.model(g("Relu", made))
    lowered = exact(model, [activation(made, POWERS)])
    norm = node_of(lowered, "LayerNormalization")
    held = [v.const_value.numpy() for v in norm.inputs[1:]]  # type: ignore[union-attr]
    assert len(held) == 1 + beta
    for seed, array in enumerate(held, 1):
        np.testing.assert_array_equal(array, sample(8, seed=seed) / POWERS)
