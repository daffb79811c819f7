"""What each node becomes in integers, or why it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_graph import SmallGraph, sample

from ptq_onnx.errors import ModelError
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.codes.log2 import Log2
from ptq_onnx.numerics.grain import PowersOfTwo
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.targets.integer.elementwise import MeanStep, TableStep
from ptq_onnx.targets.integer.fixed_point import fixed_point
from ptq_onnx.targets.integer.nodes import make_plan
from ptq_onnx.targets.integer.rules import no_float_inside

UINT8 = Rule(8, signed=False, symmetric=False)


def spec(tensor: str, scale: float = 0.05, zero: int = 128, factor: Any = None,
         rule: Rule = UINT8) -> TensorSpec:  # fmt: skip
    array = None if factor is None else np.asarray(factor, np.float32)
    return TensorSpec(tensor, rule, np.array(scale, np.float32), np.array(zero), factor=array)


def plan_of(
    g: SmallGraph, *outputs: str, specs: dict[str, Any] | None = None, **options: Any
) -> Any:
    """The plan of a graph all of whose tensors have uint8 codes but for those that are given."""
    model = g.model(*outputs)
    fuse(model)
    found: dict[str, TensorSpec] = {}
    for value in [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]:
        found[str(value.name)] = spec(str(value.name))
    for node in model.graph:
        if node.op_type in ("Linear", "Conv"):
            name = str(node.inputs[1].name)  # type: ignore[union-attr]
            found[name] = TensorSpec(name, Rule(8), np.float32(0.01), np.array(0))
    for name, one in (specs or {}).items():
        if one is None:
            del found[name]
        else:
            found[name] = one
    return make_plan(model, found, **options)


def conv(**how: Any) -> SmallGraph:
    g = SmallGraph((1, 2, 8, 8))
    group = how.get("group", 1)
    g("Conv", "x", sample(4, 2 // group, 2, 2), sample(4), **({"strides": [2, 2]} | how))
    return g


def test_convolutions_are_planned_as_they_are() -> None:
    (planned,) = plan_of(conv(), "conv0").steps.values()
    step = planned.step
    assert step.weight.shape == (4, 2, 2, 2)
    form = {"strides": (2, 2), "pads": (0, 0, 0, 0), "dilations": (1, 1), "group": 1}
    assert {name: getattr(step, name) for name in form} == form
    plan_of(conv(auto_pad="VALID"), "conv0")
    for how in ({"strides": [2, 1]}, {"pads": [0, 0, 1, 1]}, {"group": 2}, {"dilations": [2, 2]}):
        (planned,) = plan_of(conv(**how), "conv0").steps.values()
        for name, default in form.items():
            value = how.get(name, default)
            assert getattr(planned.step, name) == (value if name == "group" else tuple(value))
    ptf = Rule(8, False, False, PowersOfTwo())
    with pytest.raises(ModelError, match="its weight does not take the factors of its input"):
        plan_of(conv(), "conv0", specs={"x": spec("x", factor=np.ones((2, 1, 1)) * 2, rule=ptf)})


def one(
    op: str, *others: Any, shape: tuple[int | str, ...] = (1, 5, 4), **attributes: Any
) -> SmallGraph:
    g = SmallGraph(shape)
    g(op, "x", *others, **attributes)
    return g


def test_poolings() -> None:
    for axes, keep in ((np.array([1]), 0), (np.array([-2]), 1)):
        (planned,) = plan_of(one("ReduceMean", axes, keepdims=keep), "reducemean0").steps.values()
        assert isinstance(planned.step, MeanStep)
        assert (planned.step.axes, planned.step.keepdims) == ((1,), bool(keep))
    both = plan_of(one("ReduceMean", np.array([-2, 1]), shape=(1, 5, 6, 4)), "reducemean0")
    (planned,) = both.steps.values()
    assert planned.step.axes == (1, 2)
    step = planned.step.finish
    np.testing.assert_allclose(step.multipliers[0] / 2.0**step.shift, 1 / 30, rtol=1e-8)
    assert next(
        iter(plan_of(one("ReduceMean", np.array([1])), "reducemean0").steps.values())
    ).step.keepdims
    for axes in (np.array([2]), np.array([-1])):  # channels first
        (planned,) = plan_of(one("ReduceMean", axes), "reducemean0").steps.values()
        assert planned.step.axes == (2,)
    for axes in (np.array([0]), np.array([1, 2]), np.array([0, 1])):
        with pytest.raises(ModelError, match="only the mean over the tokens"):
            plan_of(one("ReduceMean", axes), "reducemean0")
    with pytest.raises(ModelError, match="the number of tokens is not known"):
        plan_of(one("ReduceMean", np.array([1]), shape=(1, "t", 4)), "reducemean0")


def masked(mask: Any, **specs: Any) -> Any:
    g = SmallGraph((1, 3, 3))
    added = g("Add", "x", np.asarray(mask, np.float32))
    attention = g("Softmax", added, axis=-1)
    return plan_of(g, attention, specs={added: None, **specs})


def test_masks() -> None:
    causal = np.triu(np.full((3, 3), -1e4), 1)
    add, softmax = masked(causal).steps.values()
    np.testing.assert_array_equal(add.step.open, np.tril(np.ones((3, 3))))
    codes = np.arange(9).reshape(1, 3, 3)
    np.testing.assert_array_equal(add.step(codes), np.where(np.tril(np.ones((3, 3))), codes, -1))
    assert softmax.step.masked
    whole = causal.copy()
    whole[0] = -1e4
    with pytest.raises(ModelError, match="only a mask of zeros and of what shuts out part of"):
        masked(whole)
    signed = spec("x", 0.05, 0, rule=Rule(8))
    with pytest.raises(ModelError, match="its input is not quantized in unsigned codes"):
        masked(causal, x=signed)
    with pytest.raises(ModelError, match="only a mask that is constant, and is not quantized"):
        masked(causal, add0=spec("add0"))


def test_codes_whose_scaling_is_not_rounded_stay() -> None:
    """1/√d with its rounding behind the relative positions, as in Swin."""
    g = SmallGraph((1, 5, 4))
    scaled = g("Mul", "x", np.array(0.25, np.float32))
    plan = plan_of(g, g("Softmax", scaled, axis=-1), specs={scaled: None})
    mul, softmax = plan.steps.values()
    codes = np.arange(20).reshape(1, 5, 4)
    assert mul.step(codes) is codes
    np.testing.assert_allclose((float(mul.made.scale), softmax.step.scale), 0.05 / 4, rtol=1e-7)
    g = SmallGraph((1, 5, 4))
    scaled = g("Mul", "x", np.array(-0.25, np.float32))
    with pytest.raises(ModelError, match=r"\(Mul\): its output 'mul0' stays in float"):
        plan_of(g, g("Softmax", scaled, axis=-1), specs={scaled: None})


def test_softmaxes() -> None:
    log2 = Rule(4, False, False, code=Log2())
    for axis in (-1, 2):
        plan = plan_of(
            one("Softmax", axis=axis),
            "softmax0",
            specs={"softmax0": spec("softmax0", 1, 0, rule=log2)},
        )
        (planned,) = plan.steps.values()
        assert (planned.step.tokens, planned.step.kind, planned.step.span) == (4, "log2", 255)
        assert planned.made.last == 14
    shares = Rule(6, False, False, around=(RowMaximum(), RowSums()))
    (planned,) = plan_of(
        one("Softmax"), "softmax0", specs={"softmax0": spec("softmax0", 1 / 63, 0, rule=shares)}
    ).steps.values()
    assert (planned.step.kind, planned.made.high) == ("shares", 63)
    alone = Rule(8, False, False, around=(RowMaximum(),))
    with pytest.raises(ModelError, match="not divided by their sums behind A·V"):
        plan_of(one("Softmax"), "softmax0", specs={"softmax0": spec("softmax0", 1, 0, rule=alone)})
    plan_of(one("Softmax", shape=(1, 1 << 15)), "softmax0")
    for shape in ((1, (1 << 15) + 1), (1, "t")):
        with pytest.raises(ModelError, match="not known, or beyond 32,768"):
            plan_of(one("Softmax", shape=shape), "softmax0")
    with pytest.raises(ModelError, match="only a softmax over the last axis"):
        plan_of(one("Softmax", axis=1), "softmax0")
    with pytest.raises(ModelError, match="input or output has no scale"):
        plan_of(one("Softmax"), "softmax0", specs={"softmax0": None})


def test_norms() -> None:
    g, b = np.full(4, 2.0), np.full(4, 0.5)
    (planned,) = plan_of(
        one("LayerNormalization", g, b, axis=-1), "layernormalization0"
    ).steps.values()
    assert planned.step.channels == 4
    plan_of(one("LayerNormalization", g, axis=2), "layernormalization0")
    bare = one("LayerNormalization", g, epsilon=0.01)
    (planned,) = plan_of(bare, "layernormalization0").steps.values()
    assert planned.step.epsilon == round(4**2 * 0.01 / 0.05**2)
    plan_of(one("LayerNormalization", g.reshape(1, 4), b, axis=2), "layernormalization0")
    bare = one("LayerNormalization", g, axis=2)
    with pytest.raises(ModelError, match="only the last axis can be normalised"):
        plan_of(one("LayerNormalization", np.ones((5, 4)), axis=1), "layernormalization0")
    with pytest.raises(ModelError, match="not one number for each of the 4 channels"):
        plan_of(one("LayerNormalization", np.ones((5, 4)), axis=2), "layernormalization0")
    with pytest.raises(ModelError, match="'x' stays in float"):
        plan_of(bare, "layernormalization0", specs={"x": None})


def test_scalings() -> None:
    """By a number, or a vector of channels; not per token, nor a number over the tensor."""
    for number in (0.5, np.full(4, 0.5), np.full((1, 1, 4), 0.5)):
        plan_of(one("Mul", number), "mul0")
        (planned,) = plan_of(one("Div", number), "div0").steps.values()
        (multiplier,) = planned.step.finish.multipliers
        assert float(multiplier) / 2.0 ** float(planned.step.finish.shift) == pytest.approx(2)
    with pytest.raises(ModelError, match="neither a scalar nor a vector of channels"):
        plan_of(one("Mul", np.full((5, 1), 0.5)), "mul0")
    g = SmallGraph((1, 5, 4))
    with pytest.raises(ModelError, match="only scaling by a constant"):
        plan_of(g, g("Div", 0.5, "x"))
    g = SmallGraph((1, 5, 4))
    with pytest.raises(ModelError, match="only scaling by a constant"):
        plan_of(g, g("Div", "x", "x"))
    g = SmallGraph((1, 5, 4))
    (planned,) = plan_of(g, g("Mul", "x", "x")).steps.values()
    codes = np.arange(256)
    expected = np.clip(np.floor((codes - 128) ** 2 * 0.05 + 0.5) + 128, 0, 255)
    np.testing.assert_array_equal(planned.step(codes, codes), expected)


def test_activations() -> None:
    (planned,) = plan_of(one("Gelu"), "gelu0").steps.values()
    assert isinstance(planned.step, TableStep)
    (planned,) = plan_of(one("Gelu"), "gelu0", gelu="polynomial").steps.values()
    assert not isinstance(planned.step, TableStep)
    (planned,) = plan_of(one("Relu"), "relu0").steps.values()
    x = np.arange(256)
    expected = np.clip(np.maximum(x - 128, 0) + 128, 0, 255)
    np.testing.assert_array_equal(planned.step(x), expected)
    with pytest.raises(ModelError, match="no GELU"):
        plan_of(one("Relu"), "relu0", gelu="polynomial")
    with pytest.raises(ModelError, match="its output 'relu0' stays in float"):
        plan_of(one("Relu"), "relu0", specs={"relu0": None})


@pytest.mark.parametrize(("depth", "fits"), [(33025, True), (33026, False)])
def test_the_longest_sum_of_products(depth: int, fits: bool) -> None:
    """255 · 255 · 33025 is below 2^31, one more is not."""
    g = SmallGraph((1, 2, depth))
    turned = g("Transpose", "x", perm=[0, 2, 1])
    out = g("MatMul", g("Relu", "x"), g("Relu", turned))
    zero = {name: spec(name, 0.05, 0) for name in ("relu1", "relu2", "x")}
    if fits:
        plan_of(g, out, specs=zero)
        return
    with pytest.raises(ModelError, match="sums of 33026 products overflow 32 bits"):
        plan_of(g, out, specs=zero)


@pytest.mark.parametrize(("parts", "fits"), [((5, 6605), True), ((2, 16513), False)])
def test_the_longest_sum_of_shares(parts: tuple[int, int], fits: bool) -> None:
    """The same of maps in powers of two, several of which make one row."""
    rows, tokens = parts
    g = SmallGraph((1, rows, tokens))
    flat = g("Reshape", g("Softmax", "x", axis=-1), np.array([1, rows * tokens]))
    out = g("MatMul", flat, g("Reshape", g("Relu", "x"), np.array([rows * tokens, 1])))
    log2 = Rule(8, False, False, code=Log2(), around=(RowSums(),))
    specs = {"softmax0": spec("softmax0", 1, 0, rule=log2), flat: None}
    if fits:
        plan_of(g, out, specs=specs)
        return
    with pytest.raises(ModelError, match="not known, or beyond 33,000"):
        plan_of(g, out, specs=specs)


def test_a_linear_takes_the_factors_of_its_input() -> None:
    g = SmallGraph((1, 5, 4))
    out = g("Add", g("MatMul", g("Relu", "x"), g.const(sample(4, 3), "w")), sample(3, seed=1))
    ptf = Rule(8, False, False, PowersOfTwo())
    rows = np.float32([1, 2, 4, 1])
    weight = TensorSpec("w", Rule(8), np.float32([0.01] * 3), np.zeros(3, np.int32), 1,
                        (1 / rows)[:, None])  # fmt: skip
    found = plan_of(g, out, specs={"relu0": spec("relu0", 0.05, 120, rows, ptf), "w": weight})
    planned = list(found.steps.values())[-1]
    assert (planned.step.zero, planned.step.weight.shape) == (120, (4, 3))
    with pytest.raises(ModelError, match="does not take the factors of its input"):
        plan_of(g, out, specs={"relu0": spec("relu0", 0.05, 120, rows, ptf)})
    left = plan_of(g, out, specs={"relu0": spec("relu0", 0.05, 120, rows, ptf)}, strict=False)
    assert len(left.left) == 1


@pytest.mark.parametrize("bits", [8, 31])
def test_the_largest_multiplier(bits: int) -> None:
    """A ratio beyond it is cut to 2^bits - 1."""
    step = fixed_point([np.array(2.0**40)], np.zeros(()), [1], (0, 255), bits)
    assert int(step.multipliers[0]) == 2**bits - 1
    assert int(step.shift) == 0


@pytest.mark.parametrize("op", ["Erf", "Tanh"])
def test_what_stands_beside_a_gelu_by_polynomial_stays_a_table(op: str) -> None:
    g = SmallGraph((1, 5, 4))
    planned = plan_of(g, g(op, g("Gelu", "x")), gelu="polynomial").steps
    kinds = {node.op_type: isinstance(one.step, TableStep) for node, one in planned.items()}
    assert kinds == {"Gelu": False, op: True}


@pytest.mark.parametrize("left", ["split2", "split2_1"])
def test_a_linear_of_which_a_part_stays_in_float(left: str) -> None:
    """Its columns are requantized where they end up, all or none."""
    g = SmallGraph((1, 5, 4))
    parts = g("Split", g("Add", g("MatMul", "x", sample(4, 8)), sample(8)), axis=-1, outputs=2,
              num_outputs=2)  # fmt: skip
    ends = [g("Erf", parts), g("Erf", f"{parts}_1")]
    assert len(plan_of(g, *ends, specs={"add1": None}).steps) == 3
    with pytest.raises(ModelError, match="stay"):
        plan_of(g, *ends, specs={"add1": None, left: None})


def test_what_makes_a_tensor_of_unknown_type_is_named() -> None:
    g = SmallGraph((1, 5, 4), dtype=3)
    model = g.model(g("Identity", g("Odd", "x", domain="elsewhere")))
    for node in model.graph:
        node.outputs[0].type = None
    told = [f.text for f in no_float_inside(model)]
    assert "Odd: the type of 'odd0' is not known." in told
