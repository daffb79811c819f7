"""What attends to values, and a linear that reads it otherwise than a projection does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run, sample
from test_reads import WIDTH, finish, norm, packed

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization.by_quantizer import rewritten
from ptq_onnx.graph.expansions import to_standard
from ptq_onnx.quantizers.base import Plan

TOKENS = 6
BATCHES = [sample(4, TOKENS, WIDTH, seed=s) * 2 for s in range(3)]
WAYS = ("all", "uneven", "a part", "twice", "another order", "tokens", "scaled weights", "sigmoids")


def network(way: str) -> ir.Model:
    """A block whose projection reads all channels, some, each twice, tokens in place of channels;
    or whose weights of tokens do not sum to one, or see what is added to all keys."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    q, k, v = packed(g, norm(g, "x"))
    scores = g("Mul", g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2])), 0.5)
    if way == "uneven":
        scores = g("Mul", scores, np.linspace(0.5, 1.5, TOKENS))
    weights = g("Sigmoid", scores) if way == "sigmoids" else g("Softmax", scores, axis=-1)
    weights = g("Mul", weights, np.array(0.5)) if way == "scaled weights" else weights
    made = g("Transpose", g("MatMul", weights, v), perm=[0, 2, 1, 3])
    read = g("Reshape", made, np.array([0, TOKENS, WIDTH]))
    width = WIDTH
    if way == "a part":
        read = g("Slice", read, np.array([0]), np.array([WIDTH // 2]), np.array([2]))
        width = WIDTH // 2
    elif way == "twice":
        read, width = g("Concat", read, read, axis=2), 2 * WIDTH
    elif way == "another order":
        parts = g("Reshape", read, np.array([0, TOKENS, 2, WIDTH // 2]))
        turned = g("Transpose", parts, perm=[0, 1, 3, 2])
        read = g("Reshape", turned, np.array([0, TOKENS, WIDTH]))
    elif way == "tokens":
        read, width = g("Transpose", read, perm=[0, 2, 1]), TOKENS
    out = g("Add", g("MatMul", read, sample(width, WIDTH, seed=3) * 0.4), sample(WIDTH, seed=53))
    if way == "tokens":
        out = g("Slice", out, np.array([0]), np.array([TOKENS]), np.array([1]))
    return finish(g, g("Add", "x", out))


@pytest.mark.parametrize("quantizer", ["deploy", "lowbit"])
@pytest.mark.parametrize("way", WAYS)
def test_factors_of_values_go_where_each_row_is_a_channel(way: str, quantizer: str) -> None:
    """The float model stays what it was, in any way."""
    model = network(way)
    blocks = find_blocks(model)
    bits = "8/8/8" if quantizer == "deploy" else "4/4/4"
    config = QuantizeConfig(quantizer=quantizer, bits=bits, threads=1)
    plan = rewritten(Plan(model, blocks, find_sites(model, blocks), config), BATCHES)
    x = sample(2, TOKENS, WIDTH, seed=9) * 2
    expected = run(to_standard(model), x)[0]
    found = run(to_standard(plan.model), x)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    into = {move.role: move.into for move in plan.moves}
    if way == "sigmoids":  # products alone read what is no attention's q, k or v
        assert {"norm2", "norm"} < into.keys() <= {"pre_norm", "norm2", "norm", "gelu"}
    assert ("proj" in into.values()) == (way in ("all", "uneven", "another order"))
