"""HardSigmoid and HardSwish in the spellings of exporters, and what only looks like them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from small_graph import SmallGraph, assert_same, ops, sample, text

from ptq_onnx.fusion.near_miss import near_misses
from ptq_onnx.fusion.rules import fuse

X = sample(2, 3, 5, 5) * 4
SHAPE = ("batch", 3, 5, 5)


def gate(g: SmallGraph, b: float = 3.0, low: float = 0.0, high: float = 6.0) -> str:
    return g("Clip", g("Add", "x", b), low, high)


SWISHES: dict[str, Callable[[SmallGraph], str]] = {
    "Paddle": lambda g: g("Div", g("Mul", "x", gate(g)), 6.0),
    "(x g)/6": lambda g: g("Mul", g("Mul", gate(g), "x"), 1 / 6),
    "x (g/6)": lambda g: g("Mul", "x", g("Div", gate(g), 6.0)),
    "x (g ⅙)": lambda g: g("Mul", g("Mul", gate(g), 0.16666667), "x"),
    "hard sigmoid": lambda g: g("Mul", "x", g("HardSigmoid", "x", alpha=1 / 6, beta=0.5)),
}


@pytest.mark.parametrize("spelling", SWISHES)
def test_spellings(spelling: str) -> None:
    g = SmallGraph(SHAPE)
    y = SWISHES[spelling](g)
    model = g.model(y)
    assert fuse(model)["HardSwish"] == 1
    assert ops(model) == ["HardSwish"]
    assert_same(model, g.proto(y), X)
    before = text(model)
    assert fuse(model)["HardSwish"] == 0
    assert text(model) == before


def test_a_gate_of_something_else_is_a_hard_sigmoid() -> None:
    g = SmallGraph(SHAPE)
    y = g("Mul", g("Tanh", "x"), g("Div", gate(g), 6.0))
    model = g.model(y)
    assert fuse(model)["HardSwish"] == 0
    assert ops(model) == ["HardSigmoid", "Mul", "Tanh"]
    assert_same(model, g.proto(y), X)


NEAR: dict[str, Callable[[SmallGraph], str]] = {
    "shift": lambda g: g("Div", g("Mul", "x", gate(g, b=2.0)), 6.0),
    "bottom": lambda g: g("Div", g("Mul", "x", gate(g, low=-1.0)), 6.0),
    "top": lambda g: g("Div", g("Mul", "x", gate(g, high=5.0)), 6.0),
    "divisor": lambda g: g("Div", g("Mul", "x", gate(g)), 5.0),
    "other x": lambda g: g("Div", g("Mul", g("Tanh", "x"), gate(g)), 6.0),
    "slope": lambda g: g("Mul", "x", g("HardSigmoid", "x", alpha=0.2, beta=0.5)),
    "middle": lambda g: g("Mul", "x", g("HardSigmoid", "x", alpha=1 / 6, beta=0.4)),
}


@pytest.mark.parametrize("miss", NEAR)
def test_near_misses_stay(miss: str) -> None:
    g = SmallGraph(SHAPE)
    y = NEAR[miss](g)
    model = g.model(y)
    assert fuse(model)["HardSwish"] == 0
    assert "HardSwish" not in ops(model)
    assert_same(model, g.proto(y), X)


def test_a_gate_that_is_an_output_stays() -> None:
    g = SmallGraph(SHAPE)
    clipped = gate(g)
    outputs = (clipped, g("Div", g("Mul", "x", clipped), 6.0))
    model = g.model(*outputs)
    assert fuse(model)["HardSwish"] == 0
    assert_same(model, g.proto(*outputs), X)


def test_what_is_nearly_one_is_told() -> None:
    g = SmallGraph(SHAPE)
    model = g.model(g("Div", g("Mul", "x", gate(g, b=2.0)), 6.0))
    fuse(model)
    (found,) = near_misses(model)
    assert (found.op_type, found.family) == ("Clip", "HardSwish")
    assert found.reason.startswith("The shift must be 3.")
