"""A transformer of one or two blocks, with the choices that exports differ in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from small_graph import SmallGraph, sample

from ptq_onnx.fusion.rules import fuse

TOKENS, WIDTH, HEADS = 6, 8, 2


@dataclass(frozen=True)
class Choices:
    """What a block is made of."""

    packed: bool = True
    scale: str = "behind"
    """Where 1/√d is: behind the product, before it on q, or nowhere."""
    mask: bool = False
    layer_scale: bool = False
    activation: str = "Gelu"
    norms: bool = True
    mlp: bool = True
    pool: bool = False
    """The mean over the tokens, not the first, before the head."""


def transformer(choices: Choices, blocks: int = 1) -> ir.Model:
    """tokens [batch, 6, 8] → blocks → norm → head on the first token, fused."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    x = "x"
    for index in range(blocks):
        x = _block(g, x, choices, 10 * index)
    x = _norm(g, x)
    if choices.pool:
        token = g("ReduceMean", x, np.array([1]), keepdims=0)
    else:
        token = g("Gather", x, np.array(0), axis=1)
    model = g.model(_linear(g, token, WIDTH, 4, 99))
    fuse(model)
    return model


def _linear(g: SmallGraph, x: str, rows: int, columns: int, seed: int) -> str:
    product = g("MatMul", x, sample(rows, columns, seed=seed) * 0.3)
    return g("Add", product, sample(columns, seed=seed + 50))


def _norm(g: SmallGraph, x: str) -> str:
    return g("LayerNormalization", x, np.full(WIDTH, 1.5), np.full(WIDTH, 0.1), axis=-1)


def _heads(g: SmallGraph, x: str) -> str:
    split = g("Reshape", x, np.array([0, TOKENS, HEADS, WIDTH // HEADS]))
    return g("Transpose", split, perm=[0, 2, 1, 3])


def _block(g: SmallGraph, x: str, choices: Choices, seed: int) -> str:
    y = _norm(g, x) if choices.norms else x
    if choices.packed:
        packed = _linear(g, y, WIDTH, 3 * WIDTH, seed)
        first = g("Split", packed, np.array([WIDTH] * 3), axis=2, outputs=3)
        q, k, v = (_heads(g, name) for name in (first, f"{first}_1", f"{first}_2"))
    else:
        q, k, v = (_heads(g, _linear(g, y, WIDTH, WIDTH, seed + i)) for i in range(3))
    if choices.scale == "before":
        q = g("Mul", q, 0.5)
    logits = g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2]))
    if choices.scale == "behind":
        logits = g("Mul", logits, 0.5)
    if choices.mask:
        logits = g("Add", logits, np.triu(np.full((TOKENS, TOKENS), -1e4), 1))
    attention = g("MatMul", g("Softmax", logits, axis=-1), v)
    joined = g("Transpose", attention, perm=[0, 2, 1, 3])
    joined = g("Reshape", joined, np.array([0, TOKENS, WIDTH]))
    x = g("Add", x, _branch(g, _linear(g, joined, WIDTH, WIDTH, seed + 3), choices))
    if not choices.mlp:
        return x
    y = _norm(g, x) if choices.norms else x
    y = g(choices.activation, _linear(g, y, WIDTH, 4 * WIDTH, seed + 4))
    return g("Add", x, _branch(g, _linear(g, y, 4 * WIDTH, WIDTH, seed + 5), choices))


def _branch(g: SmallGraph, x: str, choices: Choices) -> str:
    return g("Mul", x, np.full(WIDTH, 0.7)) if choices.layer_scale else x
