"""How much positions count: by the outputs, whatever the batches; all alike where it is unknown."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, sample
from small_transformer import TOKENS, WIDTH, Choices, transformer

from ptq_onnx.blocks.walking import is_linear, is_product
from ptq_onnx.engine.output_weights import EVENLY
from ptq_onnx.quantizers.importance import (
    IMAGES,
    Importance,
    find_importance,
    importance_of_inputs,
)

X = np.random.default_rng(0).normal(size=(20, TOKENS, WIDTH)).astype(np.float32)
FIRST = [EVENLY + TOKENS * (1 - EVENLY), *[EVENLY] * (TOKENS - 1)]


def normed(model: ir.Model) -> str:
    return [str(n.outputs[0].name) for n in model.graph if n.op_type == "LayerNormalization"][-1]


def test_all_is_at_the_token_that_the_head_reads() -> None:
    model = transformer(Choices())
    name = normed(model)
    found = find_importance(model, {name: (2,)}, [X])
    assert found.note is None
    np.testing.assert_allclose(found.positions[name], FIRST, rtol=1e-6)
    assert found.rows(name, (3, TOKENS)).shape == (3 * TOKENS,)
    np.testing.assert_allclose(found.rows(name, (3, TOKENS)), FIRST * 3, rtol=1e-6)


def test_a_mean_over_tokens_reads_all_alike() -> None:
    model = transformer(Choices(pool=True))
    name = normed(model)
    found = find_importance(model, {name: (2,)}, [X])
    np.testing.assert_allclose(found.positions[name], np.ones(TOKENS), rtol=1e-6)


def test_it_is_the_square_of_the_slope_in_float64() -> None:
    """logits = x₀ W₀ + x₁ W₁; the class is drawn, so that in the mean over many images
    E[g gᵀ] = W (diag p - p pᵀ) Wᵀ."""
    weights = [sample(WIDTH, 4, seed=s) * scale for s, scale in ((1, 1.0), (2, 0.3))]
    g = SmallGraph(("batch", TOKENS, WIDTH))
    tokens = [g("Gather", "x", np.array(i), axis=1) for i in range(2)]
    parts = [g("MatMul", t, w) for t, w in zip(tokens, weights, strict=True)]
    model = g.model(g("Add", *parts))
    x = np.tile(X, (200, 1, 1))
    w = np.array(weights, np.float64)
    logits = np.einsum("btc,tcn->bn", x[:, :2], w)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    spread = np.diag(p.mean(axis=0)) - p.T @ p / len(p)
    power = np.einsum("tcn,nm,tcm->t", w, spread, w)
    exact = TOKENS * power / power.sum()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ptq_onnx.quantizers.importance.IMAGES", len(x))
        found = find_importance(model, {"x": (2,)}, [x]).positions["x"]
    np.testing.assert_allclose(found[:2], EVENLY + (1 - EVENLY) * exact, rtol=0.05)
    np.testing.assert_allclose(found[2:], EVENLY, rtol=1e-6)


def test_neither_batches_nor_more_images_change_it() -> None:
    model = transformer(Choices())
    maps = [str(n.inputs[0].name) for n in model.graph if is_product(n)]
    axes = {maps[-1]: (1, 3)}
    one, other, fewer = (
        find_importance(model, axes, batches).positions[maps[-1]]
        for batches in ([X], [X[:3], X[3:]], [X[:IMAGES]])
    )
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(one, fewer)


def test_an_input_of_linears_counts_as_what_they_make() -> None:
    model = transformer(Choices())
    reads = [str(n.inputs[0].name) for n in model.graph if is_linear(n)]
    found = importance_of_inputs(model, [X], 10**12)
    # The head reads [batch, 8]: it has no positions.
    np.testing.assert_array_equal(found.rows(reads[-1], (5,)), np.ones(5))
    np.testing.assert_allclose(found.positions[reads[-2]], FIRST, rtol=1e-6)
    assert found.positions[reads[0]][0] > found.positions[reads[0]][1]


def test_few_rows_do_not_decide_alone() -> None:
    """What the last linear of the block reads, of 32 channels: w = (5, 0.2, …), (Σ w)² / Σ w² =
    36 / 25.2 of the 6 rows of an image."""
    model = transformer(Choices())
    fc2 = str([n for n in model.graph if is_linear(n)][-2].inputs[0].name)
    for images in (1, 20, 1000):
        rows = images * 36 / 25.2
        evenly = 32 / (32 + rows)
        found = importance_of_inputs(model, [X], images).positions[fc2]
        np.testing.assert_allclose(found, evenly + (1 - evenly) * np.array(FIRST), rtol=1e-5)
        assert found.mean() == pytest.approx(1)


def test_where_it_is_unknown_all_count_the_same() -> None:
    assert Importance().rows("x", (2, 3)).tolist() == [1.0] * 6
    known = Importance({"x": np.array([1.5, 0.5])})
    assert known.rows("x", (2, 3)).tolist() == [1.0] * 6
    g = SmallGraph(("batch", 4))
    model = g.model(g("Det", g("Reshape", "x", np.array([-1, 2, 2]))))
    found = find_importance(model, {"x": (1,)}, [X])
    assert found.note is not None
    assert found.note.startswith("The output is taken to depend on all positions alike; ")
    assert not found.positions


def test_what_torch_cannot_run_is_told_in_one_line() -> None:
    g = SmallGraph(("batch", "tokens", "channels"))
    model = g.model(g("MatMul", "x", sample(WIDTH + 1, 3)))
    found = importance_of_inputs(model, [X], len(X))
    assert found.note is not None
    assert found.note.startswith("The output is taken to depend on all positions alike; torch: ")
    assert "\n" not in found.note
    assert not found.positions
