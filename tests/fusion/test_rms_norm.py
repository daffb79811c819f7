"""RMS and L2 norms, SiLU and BatchNormalization behind linears: fused, or left alone."""

from __future__ import annotations

import numpy as np
import pytest
from small_graph import SmallGraph, assert_same, ops, sample, text

from ptq_onnx.fusion.rules import fuse
from ptq_onnx.preparation.model_files import to_standard

D = 8
X = sample(2, 5, D) * 2 + 1
GAMMA = sample(D, seed=1) + 1
SHAPE = ("batch", 5, D)


def rms_norm(
    g: SmallGraph,
    square: str = "mul",
    root: str = "div",
    axis: int = -1,
    exponent: float = 2.0,
    epsilon: object = 1e-6,
    gamma: object = GAMMA,
) -> str:
    squared = g("Mul", "x", "x") if square == "mul" else g("Pow", "x", exponent)
    shifted = g("Add", g("ReduceMean", squared, np.array([axis]), keepdims=1), epsilon)
    if root == "div":
        y = g("Div", "x", g("Sqrt", shifted))
    elif root == "reciprocal":
        y = g("Mul", "x", g("Reciprocal", g("Sqrt", shifted)))
    else:
        y = g("Mul", "x", g("Pow", shifted, -0.5))
    return g("Mul", gamma, y)


@pytest.mark.parametrize("square", ["mul", "pow"])
@pytest.mark.parametrize("root", ["div", "reciprocal", "pow"])
def test_rms_norm(square: str, root: str) -> None:
    g = SmallGraph(SHAPE)
    y = rms_norm(g, square, root)
    model = g.model(y)
    assert fuse(model)["RMSNormalization"] == 1
    assert ops(model) == ["RMSNormalization"]
    assert next(iter(model.graph)).name == f"/{y}"
    assert_same(model, g.proto(y), X)
    before = text(model)
    assert not any(fuse(model).values())
    assert text(model) == before


@pytest.mark.parametrize(
    "options",
    [
        {"axis": 1},
        {"square": "pow", "exponent": 3.0},
        {"epsilon": np.full(D, 1e-6)},
        {"gamma": sample(5, D)},
    ],
    ids=str,
)
def test_rms_near_misses(options: dict[str, object]) -> None:
    g = SmallGraph(SHAPE)
    model = g.model(rms_norm(g, **options))  # type: ignore[arg-type]
    before = text(model)
    assert fuse(model)["RMSNormalization"] == 0
    assert text(model) == before


def l2_norm(g: SmallGraph, axis: int = -1, keepdims: int = 1, top: bool = False) -> str:
    norm = g("ReduceL2", "x", np.array([axis]), keepdims=keepdims)
    held = g("Clip", norm, 1e-12, 3.0) if top else g("Clip", norm, 1e-12)
    return g("Div", "x", held)


def test_l2_norm() -> None:
    g = SmallGraph(SHAPE)
    y = l2_norm(g)
    model = g.model(y)
    assert fuse(model)["L2Normalization"] == 1
    assert ops(model) == ["L2Normalization"]
    assert ops(to_standard(model)) == ["Clip", "Div", "ReduceL2"]
    assert_same(model, g.proto(y), X)
    assert not any(fuse(model).values())


@pytest.mark.parametrize("options", [{"axis": 1}, {"top": True}], ids=str)
def test_l2_near_misses(options: dict[str, object]) -> None:
    g = SmallGraph(SHAPE)
    model = g.model(l2_norm(g, **options))  # type: ignore[arg-type]
    before = text(model)
    assert fuse(model)["L2Normalization"] == 0
    assert text(model) == before


def test_silu() -> None:
    g = SmallGraph(SHAPE)
    y = g("Mul", g("Sigmoid", "x"), "x")
    model = g.model(y)
    assert fuse(model)["Silu"] == 1
    assert ops(model) == ["Silu"]
    assert ops(to_standard(model)) == ["Mul", "Sigmoid"]
    assert_same(model, g.proto(y), X)
    assert not any(fuse(model).values())


@pytest.mark.parametrize("case", ["gate", "reader", "output"])
def test_silu_near_misses(case: str) -> None:
    g = SmallGraph(SHAPE)
    sigmoid = g("Sigmoid", g("Relu", "x") if case == "gate" else "x")
    outputs = [g("Mul", "x", sigmoid)]
    if case == "reader":
        outputs.append(g("Relu", sigmoid))
    if case == "output":
        outputs.append(sigmoid)
    model = g.model(*outputs)
    before = text(model)
    assert fuse(model)["Silu"] == 0
    assert text(model) == before


def batch_norm(g: SmallGraph, second_reader: bool = False, rank: int = 3) -> tuple[str, ...]:
    linear = g("Add", g("MatMul", "x", sample(D, 4, seed=2)), sample(4, seed=3))
    flat = g("Reshape", linear, np.array([-1, 4])) if rank == 3 else linear
    statistics = [sample(4, seed=s) for s in (4, 5, 6)] + [sample(4, seed=7) ** 2 + 0.5]
    y = g("BatchNormalization", flat, *statistics)
    out = g("Reshape", y, np.array([-1, 5, 4]))
    return (out, g("Relu", linear)) if second_reader else (out,)


def test_batch_norm_goes_into_the_linear() -> None:
    g = SmallGraph(SHAPE)
    outputs = batch_norm(g)
    model = g.model(*outputs)
    assert fuse(model)["LinearBatchNorm"] == 1
    assert "BatchNormalization" not in ops(model)
    assert_same(model, g.proto(*outputs), X)
    assert fuse(model)["LinearBatchNorm"] == 0


def test_batch_norm_behind_a_linear_that_is_read_elsewhere_stays() -> None:
    g = SmallGraph(SHAPE)
    outputs = batch_norm(g, second_reader=True)
    model = g.model(*outputs)
    assert fuse(model)["LinearBatchNorm"] == 0
    assert_same(model, g.proto(*outputs), X)
