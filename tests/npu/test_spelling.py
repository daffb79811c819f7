"""Ops that such a runtime has no units for, by others: the same numbers, and true shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, assert_shapes, ops, run, sample, text

from ptq_onnx.graph.expansions import to_standard
from ptq_onnx.graph.formula import DOMAIN
from ptq_onnx.qdq.spelling import fixed_sizes, spell

SHAPE = (4, 6, 5)
Case = tuple[str, list[Any], dict[str, Any], list[str]]
SPELLED: dict[str, Case] = {
    "split": ("Split", [np.array([1, 3])], {"outputs": 2}, ["Slice", "Slice"]),
    "split an axis": ("Split", [np.array([1, 2, 3])], {"axis": 1, "outputs": 3}, ["Slice"] * 3),
    "split the last": ("Split", [np.array([2, 3])], {"axis": -1, "outputs": 2}, ["Slice"] * 2),
    "gather": ("Gather", [np.array(2)], {}, ["Reshape", "Slice"]),
    "gather of an axis": ("Gather", [np.array(4)], {"axis": 1}, ["Reshape", "Slice"]),
    "gather from behind": ("Gather", [np.array(-2)], {"axis": -1}, ["Reshape", "Slice"]),
    "gather that keeps the axis": ("Gather", [np.array([3])], {"axis": 2}, ["Reshape", "Slice"]),
    "unsqueeze": ("Unsqueeze", [np.array([1])], {}, ["Reshape"]),
    "flatten": ("Flatten", [], {"axis": 2}, ["Reshape"]),
}
STAYS: dict[str, Case] = {
    "two indices": ("Gather", [np.array([0, 2])], {"axis": 1}, ["Gather"]),
    "another op": ("Transpose", [], {"perm": [0, 2, 1]}, ["Transpose"]),
}


def network(case: Case, shape: tuple[int | str, ...] = SHAPE) -> ir.Model:
    """The op, whose outputs are read, but for its last, which is given out."""
    op, inputs, attributes, _ = case
    g = SmallGraph(shape)
    made = g(op, "x", *inputs, **attributes)
    count = attributes.get("outputs", 1)
    names = [made, *(f"{made}_{k}" for k in range(1, count))]
    return g.model(*(g("Neg", name) for name in names[:-1]), names[-1])


@pytest.mark.parametrize("name", SPELLED)
def test_the_same_numbers(name: str) -> None:
    model, x = network(SPELLED[name]), sample(*SHAPE)
    expected, names = run(model, x), [v.name for v in model.graph.outputs]
    spell(model)
    for found, wanted in zip(run(model, x), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert_shapes(model, x)
    assert [v.name for v in model.graph.outputs] == names
    assert [op for op in ops(model) if op != "Neg"] == SPELLED[name][3]
    before = text(model)
    spell(model)
    assert text(model) == before


@pytest.mark.parametrize("name", STAYS)
def test_what_stays(name: str) -> None:
    model = network(STAYS[name])
    before = text(model)
    spell(model)
    assert text(model) == before


@pytest.mark.parametrize("name", SPELLED)
def test_open_shapes_stay(name: str) -> None:
    model = network(SPELLED[name], ("batch", "n", "m"))
    before = text(model)
    spell(model)
    assert text(model) == before


@pytest.mark.parametrize("name", SPELLED)
def test_shapes_that_nobody_knows_stay(name: str) -> None:
    """Of what is read or of any part that is made; a Reshape asks for what it makes alone."""
    op, *_, spelled = SPELLED[name]
    count = SPELLED[name][2].get("outputs", 1)
    for place in range(-1, count):
        model = network(SPELLED[name])
        node = next(n for n in model.graph if n.op_type == op)
        (node.outputs[place] if place >= 0 else model.graph.inputs[0]).shape = None
        before = text(model)
        spell(model)
        stays = place >= 0 or spelled != ["Reshape"]
        assert (text(model) == before) == stays


def test_squeezed_axes() -> None:
    for axes in ([1], [1, -1]):
        g = SmallGraph((4, 1, 5, 1))
        model = g.model(g("Neg", g("Squeeze", "x", np.array(axes))))
        x = sample(4, 1, 5, 1)
        (expected,) = run(model, x)
        spell(model)
        np.testing.assert_array_equal(run(model, x)[0], expected)
        assert ops(model) == ["Neg", "Reshape"]


@pytest.mark.parametrize(
    ("op", "spelled"),
    [("L2Normalization", ["LpNormalization"]), ("QuickGelu", ["Mul", "Mul", "Sigmoid"]),
     ("Silu", ["Mul", "Sigmoid"])],
)  # fmt: skip
def test_ops_of_ours(op: str, spelled: list[str]) -> None:
    """An op of that name in another domain is another op."""
    g = SmallGraph(SHAPE)
    attributes = {"epsilon": 1e-12} if op == "L2Normalization" else {}
    model = g.model(g(op, "x", domain=DOMAIN, **attributes))
    x = sample(*SHAPE)
    expected = run(to_standard(model), x)[0]
    spell(model)
    assert ops(model) == spelled
    np.testing.assert_allclose(run(model, x)[0], expected, rtol=1e-5, atol=1e-6)
    for other in ("elsewhere", "quite.elsewhere"):  # before DOMAIN and behind it
        g = SmallGraph(SHAPE)
        model = g.model(g(op, "x", domain=other))
        spell(model)
        assert ops(model) == [op]


def test_fixed_sizes() -> None:
    value = ir.val("x", ir.DataType.FLOAT, (2, 3))
    assert fixed_sizes(value) == [2, 3]
    assert fixed_sizes(ir.val("x", ir.DataType.FLOAT, ())) == []
    assert fixed_sizes(ir.val("x", ir.DataType.FLOAT, ("n", 3))) is None
    assert fixed_sizes(ir.val("x")) is None
    assert fixed_sizes(None) is None
