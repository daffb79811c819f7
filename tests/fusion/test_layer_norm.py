"""Decomposed layer norms: every spelling fuses, every near miss is left alone."""

from itertools import product

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, assert_same, ops, sample, text

from ptq_onnx.fusion.rules import fuse

D = 8
GAMMA, BETA = sample(D, seed=1) + 1, sample(D, seed=2)
X = sample(2, 5, D) * 3 + 1

ROOTS = ("div_sqrt", "div_pow", "mul_reciprocal", "mul_inverse", "mul_pow")


def layer_norm(
    g: SmallGraph,
    square: str = "pow",
    root: str = "div_sqrt",
    affine: str = "both",
    swap: bool = False,
    twice: bool = False,
    axes: int = -1,
    variance_axes: int | None = None,
    exponent: float = 2.0,
    keepdims: int = 1,
    gamma: object = GAMMA,
    beta: object = BETA,
    read_twice: bool = False,
    epsilon: object = 1e-6,
) -> str:
    """One decomposed layer norm; returns the name of its output."""

    def commuted(op: str, a: object, b: object) -> str:
        return g(op, b, a) if swap else g(op, a, b)

    second = axes if variance_axes is None else variance_axes
    mean = g("ReduceMean", "x", np.array([axes]), keepdims=keepdims)
    d = g("Sub", "x", mean)
    d2 = g("Sub", "x", mean) if twice else d
    squared = g("Pow", d2, exponent) if square == "pow" else g("Mul", d2, d2)
    variance = g("ReduceMean", squared, np.array([second]), keepdims=1)
    if read_twice:
        g("Relu", variance)
    shifted = commuted("Add", variance, epsilon)
    if root == "div_sqrt":
        y = g("Div", d, g("Sqrt", shifted))
    elif root == "div_pow":
        y = g("Div", d, g("Pow", shifted, 0.5))
    elif root == "mul_reciprocal":
        y = commuted("Mul", d, g("Reciprocal", g("Sqrt", shifted)))
    elif root == "mul_inverse":
        y = commuted("Mul", d, g("Div", 1.0, g("Sqrt", shifted)))
    else:
        y = commuted("Mul", d, g("Pow", shifted, -0.5))
    if affine in ("both", "gamma"):
        y = commuted("Mul", y, gamma)
    if affine in ("both", "beta"):
        y = commuted("Add", y, beta)
    return y


@pytest.mark.parametrize(
    ("square", "root", "swap", "twice"),
    list(product(("pow", "mul"), ROOTS, (False, True), (False, True))),
)
def test_every_spelling_fuses(square: str, root: str, swap: bool, twice: bool) -> None:
    g = SmallGraph(("batch", 5, D))
    y = layer_norm(g, square, root, swap=swap, twice=twice)
    model, reference = g.model(y), g.proto(y)
    assert fuse(model)["LayerNormalization"] == 1
    assert ops(model) == ["LayerNormalization"]
    (node,) = model.graph
    assert (node.name, node.outputs[0].name) == (f"/{y}", y)
    assert len(model.graph.initializers) == 2
    assert_same(model, reference, X)
    before = text(model)
    assert not any(fuse(model).values())
    assert text(model) == before


@pytest.mark.parametrize("affine", ["none", "gamma", "beta"])
def test_missing_gamma_or_beta(affine: str) -> None:
    g = SmallGraph(("batch", 5, D))
    y = layer_norm(g, affine=affine)
    model = g.model(y)
    assert fuse(model)["LayerNormalization"] == 1
    (node,) = model.graph
    assert len(node.inputs) == (3 if affine == "beta" else 2)
    assert_same(model, g.proto(y), X)


def test_gamma_with_leading_ones_and_positive_axis() -> None:
    g = SmallGraph(("batch", 5, D))
    y = layer_norm(g, axes=2, gamma=GAMMA.reshape(1, 1, D), beta=BETA.reshape(1, D))
    model = g.model(y)
    fuse(model)
    assert ops(model) == ["LayerNormalization"]
    assert [len(v.shape) for v in next(iter(model.graph)).inputs] == [3, 1, 1]
    assert_same(model, g.proto(y), X)


def test_two_norms_share_gamma() -> None:
    g = SmallGraph(("batch", 5, D))
    shared = g.const(GAMMA, "gamma")
    outputs = layer_norm(g, gamma=shared), layer_norm(g, gamma=shared, square="mul")
    model = g.model(*outputs)
    assert fuse(model)["LayerNormalization"] == 2
    assert len(model.graph.initializers["gamma"].uses()) == 2
    assert_same(model, g.proto(*outputs), X)


@pytest.mark.parametrize(
    "options",
    [
        {"exponent": 3.0},
        {"exponent": 2.001},
        {"axes": 1},
        {"variance_axes": 1},
        {"read_twice": True},
        {"epsilon": np.full(D, 1e-6)},
    ],
    ids=str,
)
def test_near_misses_are_left_alone(options: dict[str, object]) -> None:
    g = SmallGraph(("batch", 5, D))
    y = layer_norm(g, **options)  # type: ignore[arg-type]
    outputs = (y, g.nodes[-1].output[0])
    if options.get("read_twice"):
        outputs = (y, next(n.output[0] for n in g.nodes if n.op_type == "Relu"))
    model = g.model(*dict.fromkeys(outputs))
    before = text(model)
    assert fuse(model)["LayerNormalization"] == 0
    assert text(model) == before


def test_keepdims_zero_is_left_alone() -> None:
    g = SmallGraph((D, D))
    model = g.model(layer_norm(g, keepdims=0))
    assert fuse(model)["LayerNormalization"] == 0


@pytest.mark.parametrize("index", range(6))
def test_graph_output_inside_is_left_alone(index: int) -> None:
    g = SmallGraph(("batch", 5, D))
    y = layer_norm(g, affine="none")
    inner = [n.output[0] for n in g.nodes][index]
    model = g.model(y, inner)
    before = text(model)
    assert fuse(model)["LayerNormalization"] == 0
    assert text(model) == before


def test_constants_that_are_no_gamma_or_beta_stay() -> None:
    g = SmallGraph(("batch", 5, D))
    position = sample(5, D, seed=3)
    y = layer_norm(g, gamma=position, beta=position)
    model = g.model(y)
    assert fuse(model)["LayerNormalization"] == 1
    assert ops(model) == ["Add", "LayerNormalization", "Mul"]
    assert_same(model, g.proto(y), X)


def test_metadata_is_kept() -> None:
    g = SmallGraph(("batch", 5, D))
    y = layer_norm(g)
    model = g.model(y)
    for node in model.graph:
        node.metadata_props["namespace"] = "blocks.0.norm1"
    fuse(model)
    node: ir.Node = next(iter(model.graph))
    assert node.metadata_props["namespace"] == "blocks.0.norm1"


def keras_norm(
    g: SmallGraph, *, negated: str = "mean", pool: str = "x", sign: str = "Neg"
) -> tuple[str, str]:
    """As tf2onnx writes Keras 3's layer: means as GlobalAveragePool, x·s + (-μ·s + β)."""
    mean = g("GlobalAveragePool", pool)
    other = g("GlobalAveragePool", g("Relu", "x")) if negated == "other" else mean
    centred = g("Sub", "x", mean)
    variance = g("GlobalAveragePool", g("Mul", centred, centred))
    root = g("Sqrt", g("Add", variance, 1e-3))
    scale = g("Mul", g("Reciprocal", root), GAMMA.reshape(1, 1, D))
    offset = g("Add", g("Mul", g(sign, other), scale), BETA.reshape(1, 1, D))
    return g("Add", g("Mul", "x", scale), offset), mean


def test_keras_spelling() -> None:
    g = SmallGraph(("batch", 5, D))
    y, _ = keras_norm(g)
    model = g.model(y)
    assert fuse(model)["LayerNormalization"] == 1
    assert ops(model) == ["LayerNormalization"]
    assert_same(model, g.proto(y), X)
    before = text(model)
    fuse(model)
    assert text(model) == before


@pytest.mark.parametrize("options", [{"negated": "other"}, {"sign": "Abs"}, {"mean": True}])
def test_near_misses_of_the_keras_spelling(options: dict[str, object]) -> None:
    g = SmallGraph(("batch", 5, D))
    read = bool(options.pop("mean", False))
    y, mean = keras_norm(g, **options)  # type: ignore[arg-type]
    outputs = (y, mean) if read else (y,)
    model = g.model(*outputs)
    assert fuse(model)["LayerNormalization"] == 0
    assert_same(model, g.proto(*outputs), X)


def test_a_pool_of_images_is_no_mean_over_the_last_axis() -> None:
    g = SmallGraph(("batch", 5, D, D))
    y = g("Relu", g("GlobalAveragePool", "x"))
    model = g.model(y)
    fuse(model)
    assert ops(model) == ["GlobalAveragePool", "Relu"]
