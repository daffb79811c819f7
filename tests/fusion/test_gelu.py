"""Gelu in all its spellings, and what only looks like it."""

import math
from collections.abc import Callable
from itertools import product

import pytest
from small_graph import SmallGraph, assert_same, ops, sample, text

from ptq_onnx.fusion.rules import fuse
from ptq_onnx.preparation.model_files import to_standard

X = sample(2, 4, 8) * 3
SHAPE = ("batch", 4, 8)
K = math.sqrt(2 / math.pi)

Build = Callable[[SmallGraph, str], str]

PRODUCTS: dict[str, Build] = {
    "(half x) f": lambda g, f: g("Mul", g("Mul", "x", 0.5), f),
    "f (half x)": lambda g, f: g("Mul", f, g("Mul", 0.5, "x")),
    "x (half f)": lambda g, f: g("Mul", "x", g("Mul", f, 0.5)),
    "(x f) half": lambda g, f: g("Mul", g("Mul", "x", f), 0.5),
    "half (f x)": lambda g, f: g("Mul", 0.5, g("Mul", f, "x")),
    "(x/2) f": lambda g, f: g("Mul", g("Div", "x", 2.0), f),
    "(x f)/2": lambda g, f: g("Div", g("Mul", "x", f), 2.0),
    "x (f/2)": lambda g, f: g("Mul", "x", g("Div", f, 2.0)),
}
ERF_ARGUMENTS: dict[str, Callable[[SmallGraph], str]] = {
    "div": lambda g: g("Div", "x", math.sqrt(2)),
    "mul": lambda g: g("Mul", "x", 1 / math.sqrt(2)),
    "lum": lambda g: g("Mul", 0.7071068, "x"),
}
TANH_ARGUMENTS: dict[str, Callable[[SmallGraph], str]] = {
    "pow": lambda g: g("Mul", g("Add", "x", g("Mul", g("Pow", "x", 3.0), 0.044715)), K),
    "xxx": lambda g: g(
        "Mul", K, g("Add", g("Mul", 0.044715, g("Mul", g("Mul", "x", "x"), "x")), "x")
    ),
    "inner": lambda g: g(
        "Mul",
        g("Mul", "x", K),
        g("Add", 1.0, g("Mul", g("Mul", "x", 0.044715), "x")),
    ),
}


def one_plus(g: SmallGraph, op: str, argument: str, swap: bool = False) -> str:
    inner = g(op, argument)
    return g("Add", 1.0, inner) if swap else g("Add", inner, 1.0)


@pytest.mark.parametrize(
    ("form", "argument", "swap"), list(product(PRODUCTS, ERF_ARGUMENTS, (0, 1)))
)
def test_erf_spellings(form: str, argument: str, swap: int) -> None:
    g = SmallGraph(SHAPE)
    y = PRODUCTS[form](g, one_plus(g, "Erf", ERF_ARGUMENTS[argument](g), bool(swap)))
    check(g, y, "none")


@pytest.mark.parametrize(("form", "argument"), list(product(PRODUCTS, TANH_ARGUMENTS)))
def test_tanh_spellings(form: str, argument: str) -> None:
    g = SmallGraph(SHAPE)
    y = PRODUCTS[form](g, one_plus(g, "Tanh", TANH_ARGUMENTS[argument](g)))
    check(g, y, "tanh")


def test_a_cut_off_root_is_still_the_root() -> None:
    g = SmallGraph(SHAPE)
    plus = one_plus(g, "Erf", g("Mul", "x", 0.7071))
    model = g.model(g("Mul", g("Mul", "x", 0.5), plus))
    assert fuse(model)["Gelu"] == 1


def test_distributed_form() -> None:
    g = SmallGraph(SHAPE)
    half = g("Mul", "x", 0.5)
    erf = g("Erf", g("Div", "x", math.sqrt(2)))
    y = g("Add", g("Mul", g("Mul", "x", 0.5), erf), half)
    check(g, y, "none")


def check(g: SmallGraph, y: str, approximate: str) -> None:
    model = g.model(y)
    assert fuse(model)["Gelu"] == 1
    (node,) = model.graph
    assert node.op_type == "Gelu"
    assert node.attributes.get_string("approximate", "none") == approximate
    assert (node.name, node.outputs[0].name) == (f"/{y}", y)
    assert not model.graph.initializers
    assert_same(model, g.proto(y), X)
    before = text(model)
    assert not any(fuse(model).values())
    assert text(model) == before


def near_miss(name: str, g: SmallGraph) -> tuple[str, ...]:
    root2, half, one, inner = math.sqrt(2), 0.5, 1.0, 0.044715
    if name == "root":
        root2 *= 1.0015
    if name == "half":
        half = 0.4
    if name == "one":
        one = 1.01
    if name == "inner":
        inner = 0.0447
    if name in ("inner", "power"):
        cube = g("Pow", "x", 2.0 if name == "power" else 3.0)
        f = g("Tanh", g("Mul", g("Add", "x", g("Mul", cube, inner)), K))
    else:
        f = g("Erf", g("Div", "x", root2))
    plus = g("Add", f, one)
    left = g("Relu", "x") if name == "other x" else "x"
    y = g("Mul", g("Mul", left, half), plus)
    if name == "second reader":
        return y, g("Relu", plus)
    return (y, f) if name == "graph output" else (y,)


@pytest.mark.parametrize(
    "name", ["root", "half", "one", "inner", "power", "other x", "second reader", "graph output"]
)
def test_near_misses_are_left_alone(name: str) -> None:
    g = SmallGraph(SHAPE)
    model = g.model(*near_miss(name, g))
    before = text(model)
    assert fuse(model)["Gelu"] == 0
    assert text(model) == before


@pytest.mark.parametrize("swap", [False, True])
def test_quick_gelu(swap: bool) -> None:
    g = SmallGraph(SHAPE)
    sigmoid = g("Sigmoid", g("Mul", 1.702, "x") if swap else g("Mul", "x", 1.702))
    y = g("Mul", sigmoid, "x") if swap else g("Mul", "x", sigmoid)
    model = g.model(y)
    assert fuse(model)["QuickGelu"] == 1
    (node,) = model.graph
    assert (node.domain, node.op_type, node.name) == ("ptq_onnx", "QuickGelu", f"/{y}")
    assert ops(to_standard(model)) == ["Mul", "Mul", "Sigmoid"]
    assert ops(model) == ["QuickGelu"]
    assert_same(model, g.proto(y), X)
    assert not any(fuse(model).values())


@pytest.mark.parametrize("factor", [1.0, 1.71])
def test_other_sigmoid_gates_are_left_alone(factor: float) -> None:
    g = SmallGraph(SHAPE)
    model = g.model(g("Mul", "x", g("Sigmoid", g("Mul", "x", factor))))
    before = text(model)
    assert fuse(model)["QuickGelu"] == 0
    assert text(model) == before
