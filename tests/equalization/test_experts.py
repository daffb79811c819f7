"""Stacks of weights become linears of the same function, with a scale per output channel."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run
from small_image_model import random

from ptq_onnx.equalization.experts import MOST, experts_as_linears, left_in_float

T, K, N = 5, 8, 6


def stack(shape: tuple[int | str, ...], weight: tuple[int, ...], bias: bool) -> SmallGraph:
    g = SmallGraph(shape)
    x = g("MatMul", "x", random(0, *weight))
    if bias:
        x = g("Add", random(1, weight[-3], 1, weight[-1]), x)
    g("Gelu", x)
    return g


CASES = {
    "shared input": ((1, T, K), (3, K, N)),
    "own inputs": ((3, T, K), (3, K, N)),
    "batched": ((2, 3, T, K), (3, K, N)),
    "batched, one input": ((2, 1, T, K), (1, 3, K, N)),
    "one expert": ((2, 1, T, K), (1, K, N)),
}


def linears(model: ir.Model) -> list[ir.Node]:
    return [n for n in model.graph if n.op_type == "Linear"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equal_in_float(name: str, bias: bool) -> None:
    shape, weight = CASES[name]
    g = stack(shape, weight, bias)
    model = g.model(f"gelu{len(g.nodes) - 1}")
    x = random(2, *shape, scale=1)
    (expected,) = run(model, x)
    assert experts_as_linears(model) == 1
    assert experts_as_linears(model) == 0
    found = linears(model)
    assert len(found) == weight[-3]
    assert {len(n.inputs) for n in found} == {3 if bias else 2}
    assert not any(n.op_type in ("MatMul", "Add") for n in model.graph)
    np.testing.assert_allclose(run(model, x)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "weight"),
    [
        ((T, K), (3, K, N)),
        ((1, T, K), (MOST + 1, K, N)),
        ((2, 3, T, K), (2, 3, K, N)),
        ((3, T, K), (1, 3, K, N)),
        ((1, T, K), (K, N)),
    ],
)
def test_left_alone(shape: tuple[int, ...], weight: tuple[int, ...]) -> None:
    g = SmallGraph(shape)
    model = g.model(g("MatMul", "x", random(0, *weight)))
    assert experts_as_linears(model) == 0
    assert [n.op_type for n in model.graph] == ["MatMul"]
    said = [(v.name, reason) for v, _, reason in left_in_float(model)]
    assert [name for name, _ in said] == (["c0"] if len(weight) > 2 else [])
    assert all(" x ".join(map(str, weight)) in reason for _, reason in said)


def test_a_product_of_another_domain_is_another_op() -> None:
    g = SmallGraph((1, T, K))
    made = g("MatMul", "x", random(0, 3, K, N), domain="elsewhere")
    model = g.model(made)
    model.graph.outputs[0].shape = ir.Shape([3, T, N])
    assert experts_as_linears(model) == 0
    assert [n.op_type for n in model.graph] == ["MatMul"]


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("shape", [(3, 1, N), (3, T, N), (1, 1, N), (3, 1, 1), (N,), (2, 3, 1, N)])
def test_what_else_stands_behind_is_no_bias(op: str, shape: tuple[int, ...]) -> None:
    """An op that is no Add, or a constant of another shape: it stays behind all linears."""
    g = SmallGraph((1, T, K))
    product = g("MatMul", "x", random(0, 3, K, N))
    constant = np.abs(random(1, *shape)) + 1
    model = g.model(g(op, product, constant))
    x = random(2, 1, T, K, scale=1)
    (expected,) = run(model, x)
    assert experts_as_linears(model) == 1
    taken = op == "Add" and shape == (3, 1, N)
    assert {len(n.inputs) for n in linears(model)} == {3 if taken else 2}
    assert [n.op_type for n in model.graph].count(op) == (0 if taken else 1)
    np.testing.assert_allclose(run(model, x)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_bias_may_have_the_axes_of_the_batch() -> None:
    g = SmallGraph((2, 3, T, K))
    model = g.model(g("Add", g("MatMul", "x", random(0, 3, K, N)), random(1, 1, 3, 1, N)))
    x = random(2, 2, 3, T, K, scale=1)
    (expected,) = run(model, x)
    assert experts_as_linears(model) == 1
    assert [n.op_type for n in model.graph].count("Add") == 0
    np.testing.assert_allclose(run(model, x)[0], expected, atol=1e-5)
