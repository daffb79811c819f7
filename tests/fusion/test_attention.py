"""Attention scales end behind the product, as one Mul."""

import numpy as np
import pytest
from small_graph import SmallGraph, assert_same, ops, sample, text

from ptq_onnx.fusion.rules import fuse
from ptq_onnx.graph.formula import scalar

X = sample(2, 3, 5, 4)
SHAPE = ("batch", 3, 5, 4)
S = 4**-0.25


def attention(g: SmallGraph, case: str) -> str:
    """softmax(q kᵀ · s (+ mask)) with the scale in different places."""
    q, k = g("Relu", "x"), g("Neg", "x")
    if case == "div q":
        q = g("Div", q, 2.0)
    if case in ("both", "before"):
        q = g("Mul", q, S)
    if case == "before":
        k = g("Mul", S, k)
    k = g("Transpose", k, perm=[0, 1, 3, 2])
    if case == "both":
        k = g("Mul", k, S)
    if case == "k and after":
        k = g("Mul", k, S)
    if case == "through reshape":
        k = g("Reshape", g("Mul", k, 0.5), np.array([0, 3, 4, 5]))
    product = g("MatMul", q, k)
    if case == "k and after":
        product = g("Mul", S, product)
    if case == "div after":
        product = g("Div", product, 2.0)
    product = g("Add", product, g.const(sample(5, 5, seed=4), "mask"))
    return g("Softmax", product, axis=-1)


CASES = ["both", "before", "div q", "k and after", "through reshape", "div after"]


@pytest.mark.parametrize("case", CASES)
def test_scale_moves_behind_the_product(case: str) -> None:
    g = SmallGraph(SHAPE)
    y = attention(g, case)
    model = g.model(y)
    assert fuse(model)["AttentionScale"] == 1
    assert (ops(model).count("Mul"), ops(model).count("Div")) == (1, 0)
    (mul,) = (n for n in model.graph if n.op_type == "Mul")
    assert mul.inputs[0].producer().op_type == "MatMul"
    assert scalar(mul.inputs[1]) == pytest.approx(0.5, rel=1e-7)
    assert_same(model, g.proto(y), X)
    before = text(model)
    assert fuse(model)["AttentionScale"] == 0
    assert text(model) == before


def test_the_scaled_value_keeps_its_name() -> None:
    g = SmallGraph(SHAPE)
    y = attention(g, "both")
    product = next(n.output[0] for n in g.nodes if n.op_type == "MatMul")
    model = g.model(y, product)
    assert fuse(model)["AttentionScale"] == 1
    (mul,) = (n for n in model.graph if n.op_type == "Mul")
    assert mul.outputs[0].name == product
    assert mul.outputs[0].is_graph_output()
    assert_same(model, g.proto(y, product), X)


@pytest.mark.parametrize(
    "case", ["no softmax", "q read twice", "vector", "mul after", "q is output"]
)
def test_left_alone(case: str) -> None:
    g = SmallGraph(SHAPE)
    factor = np.ones(4) * 0.5 if case == "vector" else 0.5
    q = g("Relu", "x") if case == "mul after" else g("Mul", "x", factor)
    product = g("MatMul", q, g("Transpose", "x", perm=[0, 1, 3, 2]))
    if case == "mul after":
        product = g("Mul", product, 0.5)
    y = product if case == "no softmax" else g("Softmax", product, axis=-1)
    outputs = [y]
    if case == "q read twice":
        outputs.append(g("Relu", q))
    if case == "q is output":
        outputs.append(q)
    model = g.model(*outputs)
    before = text(model)
    assert fuse(model)["AttentionScale"] == 0
    assert text(model) == before
