"""Where the steps of vectors, found at run time, come back: behind products, or in front of the
rest."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run, sample

from ptq_onnx.graph.expansions import to_standard
from ptq_onnx.numerics.around.run_time import ColumnMaximum, TokenMaximum
from ptq_onnx.numerics.fake_quantize import fake_quantize
from ptq_onnx.numerics.grain import PowersOfTwo
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.qdq.factors import plan_factors
from ptq_onnx.qdq.lowering import lower

PLACES = {"linear": (TokenMaximum, 0), "first": (TokenMaximum, 0), "second": (ColumnMaximum, 1)}


def vectors(around: TokenMaximum, tensor: str) -> TensorSpec:
    rule = Rule(8, method="fixed", around=(around,))
    return TensorSpec(tensor, rule, np.float32(1 / 127), np.int32(0))


def reads(model: ir.Model, op: str, index: int) -> str:
    (node,) = [n for n in model.graph if n.op_type == op]
    value = node.inputs[index]
    maker = None if value is None else value.producer()
    return "" if maker is None else maker.op_type


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_product_multiplies_codes(place: str, other: bool) -> None:
    """By its own input of vectors; what else reads them, and the other input, get the values."""
    around, index = PLACES[place]
    g = SmallGraph((2, 6, 6))
    read = g("Relu", "x")
    if place == "linear":
        made = g("Linear", read, sample(6, 6, seed=1), sample(6, seed=2), domain="ptq_onnx")
    else:
        made = g("MatMul", *((read, "x") if place == "first" else ("x", read)))
    model = g.model(made, *([g("Exp", read)] if other else []))
    spec = vectors(around(), read)
    lowered = lower(model, {read: spec})
    op = "Linear" if place == "linear" else "MatMul"
    assert reads(lowered, op, index) == "DequantizeLinear"
    if other:
        assert reads(lowered, "Exp", 0) == "Mul"
    x = sample(2, 6, 6, seed=4)
    value = fake_quantize(np.maximum(x, 0), spec)
    wanted = {
        "linear": value @ sample(6, 6, seed=1) + sample(6, seed=2),
        "first": value @ x,
        "second": x @ value,
    }[place]
    found = run(to_standard(lowered), x)
    np.testing.assert_allclose(found[0], wanted, rtol=1e-4, atol=1e-4)
    if other:
        np.testing.assert_allclose(found[1], np.exp(value), rtol=1e-4)


@pytest.mark.parametrize("place", ["first", "second"])
def test_vectors_along_the_other_axis_come_back_in_front(place: str) -> None:
    """Steps of rows of a second factor, and of columns of a first, are no factors of what the
    product makes."""
    around, index = (ColumnMaximum, 0) if place == "first" else (TokenMaximum, 1)
    g = SmallGraph((2, 6, 6))
    read = g("Relu", "x")
    model = g.model(g("MatMul", *((read, "x") if place == "first" else ("x", read))))
    spec = vectors(around(), read)
    lowered = lower(model, {read: spec})
    assert reads(lowered, "MatMul", index) == "Mul"
    x = sample(2, 6, 6, seed=4)
    value = fake_quantize(np.maximum(x, 0), spec)
    wanted = value @ x if place == "first" else x @ value
    np.testing.assert_allclose(run(to_standard(lowered), x)[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("coded", ["first", "second"])
def test_a_factor_of_one_side_of_a_product_of_one_channel_comes_back(coded: str) -> None:
    """The other side, in float, has none that cancels it."""
    g = SmallGraph((2, 3, 1))
    q, k = g("Relu", "x"), g("Transpose", g("Neg", "x"), perm=[0, 2, 1])
    model = g.model(g("Softmax", g("MatMul", q, k), axis=-1))
    name = q if coded == "first" else k
    rule = Rule(8, False, False, PowersOfTwo())
    spec = TensorSpec(name, rule, np.float32(0.02), np.int32(120), factor=np.float32([[4.0]]))
    (place,) = plan_factors(model.graph, {name: spec}).places.values()
    assert dict(place.behind) == {}
    assert [node.op_type for node, _ in place.rescaled] == ["MatMul"]
