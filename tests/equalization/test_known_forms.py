"""Forms fire on what they take, state true shapes, and leave every near miss as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, assert_shapes, ops, run, sample, text

from ptq_onnx.equalization.experts import experts_as_linears
from ptq_onnx.equalization.foldings import keys_may_shift, norm_before
from ptq_onnx.equalization.linear_weights import scale_columns, set_linear
from ptq_onnx.equalization.padding import pads_of
from ptq_onnx.equalization.patch_forms import packed_pixels_as_linear, patches_as_linear
from ptq_onnx.equalization.runtime_forms import (
    fold_attention_scales,
    keep_rank,
    unpack_attention,
)
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.graph.formula import constant

Form = Callable[[ir.Model], int]
B, H, T, E = "batch", 2, 6, 4


def fires(form: Form, model: ir.Model, x: np.ndarray, count: int = 1) -> None:
    """So often, with the same numbers and true shapes, and never again."""
    expected = run(model, x)
    assert form(model) == count
    for found, wanted in zip(run(model, x), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert_shapes(model, x)
    assert form(model) == 0


def stays(form: Form, model: ir.Model) -> None:
    before = text(model)
    assert form(model) == 0
    assert text(model) == before


# --- patches ------------------------------------------------------------------------------------


def patches(
    batch: int | str = B,
    size: tuple[int, int] = (8, 12),
    kernel: tuple[int, int] = (2, 3),
    bias: bool = True,
    how: str = "flat",
) -> ir.Model:
    """A convolution whose kernel is its stride, and its tokens."""
    g = SmallGraph((batch, 3, *size))
    weights = [sample(5, 3, *kernel, seed=1), *([sample(5, seed=2)] if bias else [])]
    y = g("Conv", "x", *weights, strides=list(kernel))
    count = (size[0] // kernel[0]) * (size[1] // kernel[1])
    rows = 0 if batch == B else batch
    if how == "flat":
        y = g("Transpose", g("Reshape", y, np.array([rows, 5, count])), perm=[0, 2, 1])
    elif how == "grid":
        y = g("Transpose", y, perm=[0, 2, 3, 1])
    elif how == "turned":  # the channels end up last, but the places are the other way round
        y = g("Transpose", y, perm=[0, 3, 2, 1])
    elif how == "heads":  # tokens with channels last, but not in one axis
        y = g("Reshape", y, np.array([rows, 1, 5, count]))
        y = g("Transpose", g("Reshape", y, np.array([rows, 5, 1, count])), perm=[0, 3, 1, 2])
    elif how == "two":
        first = g("Transpose", y, perm=[0, 2, 3, 1])
        return g.model(g("Neg", first), g("Neg", y))
    elif how == "output":
        return g.model(g("Neg", g("Transpose", y, perm=[0, 2, 3, 1])), y)
    elif how == "concat":
        y = g("Concat", y, y, axis=3)
    return g.model(g("Neg", y))


@pytest.mark.parametrize("batch", [B, 2])
@pytest.mark.parametrize("how", ["flat", "grid"])
@pytest.mark.parametrize("bias", [True, False])
def test_patches(batch: int | str, how: str, bias: bool) -> None:
    model = patches(batch, bias=bias, how=how)
    fires(patches_as_linear, model, sample(2, 3, 8, 12, seed=9))
    assert "Conv" not in ops(model)
    (linear,) = [n for n in model.graph if n.op_type == "Linear"]
    assert linear.name == "/conv0"
    assert len(linear.inputs) == 2 + bias
    assert [len(n.outputs[0].shape or []) for n in model.graph if n.op_type == "Reshape"] == (
        [6, 3] if how == "flat" else [6, 3, 4]
    )


@pytest.mark.parametrize(
    "options",
    [
        {"size": (9, 12)}, {"size": (8, 13)}, {"how": "two"}, {"how": "output"}, {"how": "none"},
        {"how": "turned"}, {"how": "concat"}, {"how": "heads"},
    ],
    ids=str,
)  # fmt: skip
def test_other_convolutions_stay(options: dict[str, Any]) -> None:
    stays(patches_as_linear, patches(**options))


def pixels(group: int = 1, pads: int = 0, stride: int = 1, outputs: int = 0) -> ir.Model:
    """q, k and v of one convolution of one pixel; ``outputs``: what else is given out."""
    g = SmallGraph((B, 4, 3, 2))
    weight = sample(12, 4 // group, 1, 1, seed=1)
    made = g("Conv", "x", weight, sample(12, seed=2), group=group, pads=[pads] * 4,
             strides=[stride] * 2)  # fmt: skip
    rows = g("Reshape", made, np.array([0, 12, -1]))
    q = g("Split", rows, np.array([4, 4, 4]), axis=1, outputs=3)
    k, v = f"{q}_1", f"{q}_2"
    scores = g("MatMul", g("Transpose", q, perm=[0, 2, 1]), k)
    out = g("MatMul", v, g("Softmax", scores, axis=-1))
    if outputs == 2:
        return g.model(out, g("Neg", made))
    return g.model(out, *([made] if outputs else []))


def test_packed_pixels() -> None:
    model = pixels()
    fires(packed_pixels_as_linear, model, sample(2, 4, 3, 2, seed=9))
    assert "Conv" not in ops(model)
    assert [n.name for n in model.graph if n.op_type == "Linear"] == ["/conv0"]


@pytest.mark.parametrize(
    "options",
    [{"group": 2}, {"pads": 1}, {"stride": 2}, {"outputs": 1}, {"outputs": 2}],
    ids=str,
)
def test_other_pixels_stay(options: dict[str, int]) -> None:
    stays(packed_pixels_as_linear, pixels(**options))


# --- attention ----------------------------------------------------------------------------------


def attention(
    *,
    scale: Any = 0.25,
    packed: bool = True,
    second: str = "",
    bias: bool = True,
    turn: tuple[int, ...] = (0, 2, 3, 1),
    batch: int | str = B,
) -> ir.Model:
    """Self-attention with its scale behind QKᵀ; ``second``: what else reads a tensor of it."""
    g = SmallGraph((batch, T, H * E))
    width, rows = H * E, 0 if batch == B else batch

    def linear(seed: int, columns: int) -> str:
        product = g("MatMul", "x", sample(width, columns, seed=seed) * 0.3)
        return g("Add", product, sample(columns, seed=seed + 9)) if bias else product

    if packed:
        whole = linear(1, 3 * width)
        first = g("Split", whole, np.array([width] * 3), axis=2, outputs=3)
        parts = [first, f"{first}_1", f"{first}_2"]
    else:
        parts = [linear(seed, width) for seed in (1, 2, 3)]
    split = [g("Reshape", p, np.array([rows, T, H, E])) for p in parts]
    q, v = (g("Transpose", split[i], perm=[0, 2, 1, 3]) for i in (0, 2))
    k = g("Transpose", split[1], perm=list(turn))
    scores = g("MatMul", q, k)
    factor = np.asarray(scale, np.float32)
    scaled = g("Mul", scores, factor)
    out = g("MatMul", g("Softmax", scaled, axis=-1), v)
    read = {"scores": scores, "q": q}.get(second)
    more = [scores] if second == "product" else [g("Neg", read)] if read else []
    model = g.model(out, *more)
    fuse(model)
    return model


X = sample(2, T, H * E, seed=9)


def test_packed_keys_and_values() -> None:
    """Two parts are enough; the queries come from elsewhere."""
    g, width = SmallGraph((B, T, H * E)), H * E
    packed = g("Add", g("MatMul", "x", sample(width, 2 * width)), sample(2 * width, seed=1))
    first = g("Split", packed, np.array([width] * 2), axis=2, outputs=2)
    q = g("Add", g("MatMul", "x", sample(width, width, seed=2)), sample(width, seed=3))
    q, k, v = (g("Reshape", part, np.array([0, T, H, E])) for part in (q, first, f"{first}_1"))
    scores = g("MatMul", g("Transpose", q, perm=[0, 2, 1, 3]), g("Transpose", k, perm=[0, 2, 3, 1]))
    out = g("MatMul", g("Softmax", scores, axis=-1), g("Transpose", v, perm=[0, 2, 1, 3]))
    model = g.model(out)
    fuse(model)
    fires(unpack_attention, model, X)
    assert "Split" not in ops(model)


def test_64_experts_are_the_most() -> None:
    for count, expected in ((64, 1), (65, 0)):
        g = SmallGraph((1, 2, 3))
        model = g.model(g("MatMul", "x", sample(count, 3, 2)))
        assert experts_as_linears(model) == expected


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [B, 1])
def test_packed_attention(bias: bool, batch: int | str) -> None:
    model = attention(bias=bias, batch=batch)
    fires(unpack_attention, model, X[:1])
    linears = [n for n in model.graph if n.op_type == "Linear"]
    assert [list(constant(n.inputs[1]).shape) for n in linears] == [[8, 8]] * 3  # type: ignore[union-attr]
    assert "Split" not in ops(model)
    assert [n.inputs[1].name for n in linears] == ["c0_0", "c0_1", "c0_2"]  # type: ignore[union-attr]
    fires(fold_attention_scales, model, X[:1])
    assert "Mul" not in ops(model)


@pytest.mark.parametrize("options", [{"packed": False}, {"second": "q"}, {"batch": 2}], ids=str)
def test_what_is_not_packed_stays(options: dict[str, Any]) -> None:
    stays(unpack_attention, attention(**options))


@pytest.mark.parametrize("packed", [True, False])
def test_a_scale_goes_into_the_queries_alone(packed: bool) -> None:
    model = attention(packed=packed, scale=0.3)
    fires(fold_attention_scales, model, X)
    (before,) = [n for n in attention(packed=packed).graph if n.op_type == "Linear"][:1]
    (after,) = [n for n in model.graph if n.op_type == "Linear"][:1]
    old, new = constant(before.inputs[1]), constant(after.inputs[1])
    assert old is not None
    np.testing.assert_allclose(new[:, :8], 0.3 * old[:, :8], rtol=1e-6)  # type: ignore[index]
    np.testing.assert_array_equal(new[:, 8:], old[:, 8:])  # type: ignore[index]


@pytest.mark.parametrize(
    "options",
    [{"second": "scores"}, {"second": "product"}, {"second": "q"}, {"scale": np.ones(T)},
     {"scale": 0.0}],
    ids=str,
)  # fmt: skip
def test_other_scales_stay(options: dict[str, Any]) -> None:
    stays(fold_attention_scales, attention(packed=False, **options))


@pytest.mark.parametrize("maker", ["", "Relu", "LayerNormalization"])
def test_a_scale_of_queries_that_no_linear_makes_stays(maker: str) -> None:
    g = SmallGraph((B, T, E))
    more = (np.ones(E), np.zeros(E)) if maker == "LayerNormalization" else ()
    q = g(maker, "x", *more) if maker else "x"
    k = g("Add", g("MatMul", "x", sample(E, E)), sample(E, seed=1))
    scores = g("Mul", g("MatMul", q, g("Transpose", k, perm=[0, 2, 1])), np.float32(0.5))
    model = g.model(g("MatMul", g("Softmax", scores, axis=-1), k))
    fuse(model)
    stays(fold_attention_scales, model)


def test_linears_of_two_axes() -> None:
    g = SmallGraph((B, 5))
    model = g.model(g("Add", g("MatMul", "x", sample(5, 3)), sample(3, seed=1)))
    fuse(model)
    expected = run(model, sample(2, 5, seed=2))
    assert keep_rank(model) == 1
    np.testing.assert_allclose(run(model, sample(2, 5, seed=2))[0], expected[0], rtol=1e-5)
    assert_shapes(model, sample(2, 5, seed=2))
    assert ops(model) == ["Linear", "Squeeze", "Unsqueeze"]
    stays(keep_rank, model)


@pytest.mark.parametrize(
    ("shape", "weight"),
    [((B, T, 8), (3, 8, 5)), ((B, 3, T, 8), (3, 8, 5)), ((B, 1, T, 8), (1, 3, 8, 5)),
     ((2, B, 3, T, 8), (3, 8, 5)), ((3, T, 8), (3, 8, 5)), ((B, 1, T, 8), (1, 1, 8, 5))],
)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_shapes_of_experts(shape: tuple[Any, ...], weight: tuple[int, ...], bias: bool) -> None:
    if shape == (B, T, 8):
        shape = (1, T, 8)
    g = SmallGraph(shape)
    y = g("MatMul", "x", sample(*weight))
    shape_of_bias = (*weight[:-3], weight[-3], 1, 5)
    y = g("Add", y, sample(*shape_of_bias, seed=1)) if bias else y
    model = g.model(g("Neg", y))
    sizes = tuple(2 if d == B else d for d in shape)
    fires(experts_as_linears, model, sample(*sizes, seed=2))
    linears = [n for n in model.graph if n.op_type == "Linear"]
    assert [len(n.inputs) for n in linears] == [2 + bias] * weight[-3]


# --- weights ------------------------------------------------------------------------------------


def linear_model(shared: bool, bias: bool = True) -> ir.Model:
    g = SmallGraph((B, 4))
    weight = g.const(sample(4, 4))
    first = g("MatMul", "x", weight)
    first = g("Add", first, sample(4, seed=1)) if bias else first
    model = g.model(g("Add", g("MatMul", first, weight if shared else sample(4, 4, seed=2)),
                      sample(4, seed=3)))  # fmt: skip
    fuse(model)
    return model


@pytest.mark.parametrize("shared", [True, False])
def test_a_weight_of_two_linears_stays_the_other_s(shared: bool) -> None:
    """A weight of one keeps its name and its initializer; of two, the first gets its own."""
    model = linear_model(shared)
    first, second = [n for n in model.graph if n.op_type == "Linear"]
    name, other = first.inputs[1].name, constant(second.inputs[1])  # type: ignore[union-attr]
    count = len(model.graph.initializers)
    set_linear(model.graph, first, np.eye(4) * 2, np.ones(4))
    np.testing.assert_array_equal(constant(first.inputs[1]), np.eye(4) * 2)
    np.testing.assert_array_equal(constant(first.inputs[2]), np.ones(4))
    np.testing.assert_array_equal(constant(second.inputs[1]), other)
    assert (first.inputs[1].name == name) is not shared  # type: ignore[union-attr]
    assert len(model.graph.initializers) == count + shared


def test_columns_of_a_linear_without_a_bias() -> None:
    model = linear_model(False, bias=False)
    first = next(n for n in model.graph if n.op_type == "Linear")
    old = constant(first.inputs[1])
    assert old is not None
    scale_columns(model.graph, first, np.array([1, 3]), np.array([2.0, 4]), np.array([6.0, 8]))
    np.testing.assert_allclose(constant(first.inputs[1]), old / np.float32([1, 2, 1, 4]), rtol=1e-6)
    np.testing.assert_allclose(constant(first.inputs[2]), [0, -3, 0, -2])
    scale_columns(model.graph, first, np.array([1]), np.float64(0.5))
    np.testing.assert_allclose(constant(first.inputs[2]), [0, -6, 0, -2])


@pytest.mark.parametrize("side", [7, 8, 9])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (2, 2), (3, 5)])
@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_pads_are_those_of_the_runtime(auto: str, side: int, stride: int, kernel: int) -> None:
    """A convolution with them written down makes the same picture."""
    weight, shape = sample(1, 1, kernel, 3), (1, 1, side, side + 2)

    def model(**how: Any) -> ir.Model:
        g = SmallGraph(shape)
        return g.model(g("Conv", "x", weight, strides=[stride, 1], **how))

    asked = model(auto_pad=auto)
    found = pads_of(next(iter(asked.graph)))
    assert found == 0 or (isinstance(found, tuple) and any(found))
    written = model(pads=list(found) if isinstance(found, tuple) else [0] * 4)
    x = sample(*shape, seed=3)
    np.testing.assert_allclose(run(asked, x)[0], run(written, x)[0], atol=1e-6)


def test_pads_of_a_dilated_kernel() -> None:
    """Three rows, two apart, reach over five: 3 · 2 + 5 - 7 = 4 more are read at stride 2."""
    g = SmallGraph((1, 1, 7, 4))
    model = g.model(g("Conv", "x", sample(1, 1, 3, 1), strides=[2, 1], dilations=[2, 1],
                      auto_pad="SAME_UPPER"))  # fmt: skip
    assert pads_of(next(iter(model.graph))) == (2, 0, 2, 0)


# --- what a move may pass -----------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, 2, 1, None])
@pytest.mark.parametrize("used", [False, True])
def test_norms_of_the_last_axis_move(axis: int | None, used: bool) -> None:
    """Over another axis, or where its mean is read, a norm takes no factors."""
    g = SmallGraph((B, T, 8))
    how = {} if axis is None else {"axis": axis}
    scale = np.ones((T, 8) if axis == 1 else 8, np.float32)
    y = g("LayerNormalization", "x", scale, 0 * scale, outputs=3, **how)
    out = g("Add", g("MatMul", y, sample(8, 3)), sample(3))
    model = g.model(out, *([g("Neg", f"{y}_1")] if used else []))
    fuse(model)
    (norm,) = [n for n in model.graph if n.op_type == "LayerNormalization"]
    if not used:
        norm.resize_outputs(3)  # mean and deviation, which nothing reads
    found = norm_before(norm.outputs[0])
    assert (found is not None) == (axis != 1 and not used)
    if found is not None:
        assert (found.node, [n.op_type for n in found.linears]) == (norm, ["Linear"])


def logits(*steps: tuple[str, Any], axis: int = -1, twice: bool = False) -> ir.Node:
    g = SmallGraph((2, T, 8))
    y = product = g("MatMul", "x", g("Transpose", "x", perm=[0, 2, 1]))
    for op, other in steps:
        y = g(op, y, other) if other is not None else g(op, y)
    model = g.model(g("Softmax", y, axis=axis), *([g("Neg", y)] if twice else []))
    return next(n for n in model.graph if n.outputs[0].name == product)


def test_keys_may_shift_where_a_softmax_takes_it_away() -> None:
    half, mask = np.array(0.5), np.zeros((T, T))
    for steps in ([], [("Mul", half)], [("Div", half), ("Add", mask)], [("Add", mask)] * 7):
        assert keys_may_shift(logits(*steps)), steps
    assert keys_may_shift(logits(axis=2))
    for steps in ([("Relu", None)], [("Mul", np.ones(T))], [("Div", np.ones(T))],
                  [("Add", mask)] * 8, [("Mul", half), ("Tanh", None)]):  # fmt: skip
        assert not keys_may_shift(logits(*steps)), steps
    assert not keys_may_shift(logits(axis=1))
    assert not keys_may_shift(logits(axis=0))
    assert not keys_may_shift(logits(twice=True))
    assert not keys_may_shift(logits(("Mul", half), twice=True))
