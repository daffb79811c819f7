"""What forms and foldings take and what they must leave, where one thing alone is different."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run, sample, text
from test_known_forms import B, E, H, T, attention, fires, stays

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.walking import is_product
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization.foldings import hidden_channels, readers_of, value_path
from ptq_onnx.equalization.norm_readers import behind_norm
from ptq_onnx.equalization.patch_forms import packed_pixels_as_linear
from ptq_onnx.equalization.reads import integer_readers, own_reads
from ptq_onnx.equalization.runtime_forms import (
    fold_attention_scales,
    keep_rank,
    unpack_attention,
)
from ptq_onnx.fusion.rules import fuse

X = sample(2, T, H * E, seed=9)


def linear(g: SmallGraph, x: str, rows: int, columns: int, seed: int = 1) -> str:
    return g("Add", g("MatMul", x, sample(rows, columns, seed=seed)), sample(columns, seed=seed))


def fused(g: SmallGraph, *outputs: str) -> ir.Model:
    model = g.model(*outputs)
    fuse(model)
    return model


def named(model: ir.Model, name: str) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


# --- packed projections -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "split", "order"),
    [
        ((B, 8), (0, 2, 2, 2), (1, 2, 0, 3)),
        ((B, 2, T, 8), (0, 2, T, 3, 8), (3, 0, 1, 2, 4)),
        ((B, "tokens", 8), (0, -1, 3, 2, 4), (2, 0, 3, 1, 4)),
    ],
    ids=["two axes", "four axes", "an open number of tokens"],
)
def test_packed_linears_of_other_shapes_stay(
    shape: tuple[Any, ...], split: tuple[int, ...], order: tuple[int, ...]
) -> None:
    g = SmallGraph(shape)
    if len(shape) == 2:
        packed = linear(g, "x", 8, 16)
        first = g("Split", packed, np.array([8, 8]), axis=1, outputs=2)
        q, k = (g("Reshape", part, np.array(split)) for part in (first, f"{first}_1"))
        model = fused(g, g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2])))
    else:
        parts = g("Reshape", linear(g, "x", 8, 24), np.array(split))
        turned = g("Transpose", parts, perm=list(order))
        q, k, v = (g("Gather", turned, np.array(i), axis=0) for i in range(3))
        scores = g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2]))
        model = fused(g, g("MatMul", g("Softmax", scores, axis=-1), v))
    stays(unpack_attention, model)


def test_parts_and_scores_that_are_outputs_keep_their_names() -> None:
    """The product reads them as before; what is given out is the same."""

    def shown(op: str) -> ir.Model:
        model = attention()
        (node,) = [n for n in model.graph if n.op_type == op][:1]
        model.graph.outputs.append(node.outputs[0])
        return model

    for form, model in ((unpack_attention, shown("Transpose")), (fold_attention_scales,
                                                                 shown("Mul"))):  # fmt: skip
        names = [v.name for v in model.graph.outputs]
        fires(form, model, X)
        assert [v.name for v in model.graph.outputs] == names


def test_a_linear_of_two_axes_that_others_read_too() -> None:
    """A product reads the token axis's result as all others do."""
    g = SmallGraph((B, 5))
    first = linear(g, "x", 5, 5)
    model = fused(g, linear(g, first, 5, 3, seed=3), g("Neg", first), first)
    x = sample(2, 5, seed=2)
    names, expected = [v.name for v in model.graph.outputs], run(model, x)
    assert keep_rank(model) == 2
    assert [v.name for v in model.graph.outputs] == names
    for found, wanted in zip(run(model, x), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    stays(keep_rank, model)


@pytest.mark.parametrize(("parts", "count"), [(1, 0), (2, 1), (3, 1)])
def test_packed_pixels_are_two_parts_at_least(parts: int, count: int) -> None:
    g = SmallGraph((B, 4, 3, 2))
    made = g("Conv", "x", sample(4 * parts, 4, 1, 1, seed=1), sample(4 * parts, seed=2))
    rows = g("Reshape", made, np.array([0, 4 * parts, -1]))
    if parts == 1:
        model = g.model(g("MatMul", rows, g("Reshape", "x", np.array([0, 6, 4]))))
    else:
        q = g("Split", rows, np.array([4] * parts), axis=1, outputs=parts)
        scores = g("MatMul", g("Transpose", q, perm=[0, 2, 1]), f"{q}_1")
        model = g.model(g("MatMul", f"{q}_2", scores) if parts == 3 else scores)
    if count:
        fires(packed_pixels_as_linear, model, sample(2, 4, 3, 2, seed=9))
    else:
        stays(packed_pixels_as_linear, model)


# --- where values go ----------------------------------------------------------------------------


def values(
    *,
    weights: Callable[[SmallGraph, str], str] = lambda g, x: g("Softmax", x, axis=-1),
    second: str = "",
    between: str = "",
    as_keys: bool = False,
) -> tuple[ir.Model, str]:
    """Weights of tokens times v, read by a linear; and v's name."""
    g = SmallGraph((B, T, 8))
    v = linear(g, "x", 8, 8)
    scores = weights(g, g("MatMul", "x", sample(8, T, seed=2)))
    other = g("Reshape", g("MatMul", "x", sample(8, 8, seed=3)), np.array([0, 8, T]))
    product = g("MatMul", v, other) if as_keys else g("MatMul", scores, v)
    read = g(between, product) if between else product
    width = T if as_keys else 8
    out = linear(g, read, width, 3, seed=4)
    more = {"v": v, "product": product}.get(second)
    return fused(g, out, *([linear(g, more, 8, 3, seed=5)] if more else [])), v


@pytest.mark.parametrize(
    "options",
    [
        {"second": "v"}, {"second": "product"}, {"between": "Relu"}, {"as_keys": True},
        {"weights": lambda g, x: g("Softmax", x, axis=1)},
        {"weights": lambda g, x: g("Sigmoid", x)},
        {"weights": lambda g, x: g("Mul", g("Softmax", x, axis=-1), np.array(0.5))},
    ],
    ids=["values read twice", "product read twice", "between", "no values", "other axis",
         "no softmax", "scaled weights"],
)  # fmt: skip
def test_values_that_reach_a_linear_otherwise_have_no_path(options: dict[str, Any]) -> None:
    model, v = values(**options)
    assert value_path(named(model, v)) is None


def test_the_path_of_values() -> None:
    model, v = values()
    path = value_path(named(model, v))
    assert path is not None
    assert is_product(path[0])
    assert path[0].inputs[1] is named(model, v)
    assert path[1].outputs[0] is model.graph.outputs[0]
    weights = path[0].inputs[0]
    assert weights is not None
    assert value_path(weights) is None  # the other factor
    model.graph.outputs.append(named(model, v))
    assert value_path(named(model, v)) is None


def test_linears_alone_read_a_tensor_as_data() -> None:
    g = SmallGraph((B, 4))
    y = g("Relu", "x")
    model = fused(g, linear(g, y, 4, 3), linear(g, y, 4, 2, seed=2))
    found = readers_of(named(model, y))
    assert found is not None
    assert [n.op_type for n in found] == ["Linear", "Linear"]
    model.graph.outputs.append(named(model, y))
    assert readers_of(named(model, y)) is None
    model.graph.outputs.pop()
    assert readers_of(model.graph.outputs[0]) is None  # nothing does
    found[0].replace_input_with(0, model.graph.inputs[0])
    found[0].replace_input_with(2, named(model, y))
    assert readers_of(named(model, y)) is None  # as a bias
    g = SmallGraph((B, 4))
    y = g("Relu", "x")
    model = fused(g, linear(g, y, 4, 3), g("Neg", y))
    assert readers_of(named(model, y)) is None


@pytest.mark.parametrize("near", ["", "op", "two", "shown", "no linear", "no shape"])
def test_hidden_channels_are_of_a_linear_that_one_activation_reads(near: str) -> None:
    g = SmallGraph((B, 4))
    before = g("Neg", "x") if near == "no linear" else linear(g, "x", 4, 4)
    y = g("Tan" if near == "op" else "Gelu", before)
    out = linear(g, y, 4, 3, seed=2)
    model = fused(g, out, *([g("Neg", before)] if near == "two" else []))
    value = named(model, y)
    if near == "shown":
        model.graph.outputs.append(named(model, before))
    if near == "no shape":
        value.shape = None
    linears = readers_of(value)
    assert linears is not None
    found = hidden_channels(value, linears)
    assert (found is None) == bool(near)
    if found is not None:
        assert (found.before, found.activation) == (named(model, before).producer(),
                                                    value.producer())  # fmt: skip
        assert found.after == linears


# --- reads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_ranges_at_run_time_need_a_copy_behind_layout_ops(first: bool) -> None:
    """Of linears that alone read a tensor, those behind a Reshape, whichever stands first."""
    for at_run_time in (False, True):
        g = SmallGraph((B, 6, 8))
        y = g("Tanh", "x")
        made = []
        for straight in (first, not first):
            read = y if straight else g("Reshape", y, np.array([0, 3, 2, 8]))
            made.append(g("Linear", read, sample(8, 3), domain="ptq_onnx"))
        model = g.model(*made)
        before = text(model)
        blocks = find_blocks(model)
        takes = integer_readers(QuantizeConfig(quantizer="deploy"), blocks)
        roles = own_reads(model, blocks, takes, at_run_time=at_run_time)
        copies = [n for n in model.graph if n.op_type == "Identity"]
        assert len(copies) == len(roles) == int(at_run_time)
        assert (text(model) == before) is not at_run_time
        for node in copies:
            maker = node.inputs[0].producer()  # type: ignore[union-attr]
            assert maker is not None
            assert maker.op_type == "Reshape"
            assert [use.node.op_type for use in node.outputs[0].uses()] == ["Linear"]


ONES = np.ones(8)


@pytest.mark.parametrize(
    ("gamma", "beta", "kept"),
    [
        (ONES, [2.5, *[0.0] * 7], True),
        (ONES, [-2.5, *[0.0] * 7], True),
        (ONES, [2.9, *[0.0] * 7], False),
        (ONES, [-2.9, *[0.0] * 7], False),
        (ONES, ONES, True),
        (2 * ONES, [5.0, *[0.0] * 7], True),
        (ONES / 2, [1.25, *[0.0] * 7], True),
        (ONES / 2, [1.5, *[0.0] * 7], False),
        ([0.0, *[1.0] * 7], [0.0, 1.0, *[0.0] * 6], True),
        ([0.0, *[1.0] * 7], [1.0, *[0.0] * 7], False),
    ],
)
def test_a_norm_keeps_no_shift_larger_than_what_it_makes(
    gamma: list[float], beta: list[float], kept: bool
) -> None:
    """The root mean square of β/γ is 1 at most, where a sum over tokens stands behind it; else
    what was there before is restored in front of the sum."""
    g = SmallGraph((2, 4, 8))
    normed = g("LayerNormalization", "x", np.array(gamma), np.array(beta), axis=-1)
    total = g("ReduceSum", normed, np.array([1]), keepdims=0)
    model = g.model(g("Add", g("MatMul", total, sample(8, 4)), sample(4)))
    fuse(model)
    norm = next(n for n in model.graph if n.op_type == "LayerNormalization")
    found = behind_norm(norm, 2, 8, ())
    assert found.keeps_shift == kept
    assert [v.name for v in found.restored] == ([] if kept else [normed])
    assert [n.op_type for n in found.readers] == (["Linear"] if kept else [])
