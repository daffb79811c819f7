"""What equalising chooses, in numbers that stand for its constants."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, sample
from small_transformer import TOKENS, WIDTH, Choices, transformer

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization.equalize import equalise
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.quantizers.base import Move, Plan

BATCHES = [sample(4, TOKENS, WIDTH, seed=s).astype(np.float32) * 3 for s in range(3)]


def moves(model: ir.Model) -> dict[str, Move]:
    """The moves of an equalised model by role, one block of it."""
    blocks = find_blocks(model)
    config = QuantizeConfig(quantizer="deploy", threads=1)
    plan = equalise(Plan(model, blocks, find_sites(model, blocks), config), BATCHES)
    return {move.role: move for move in plan.moves if isinstance(move, Move)}


def wide_mlp(hidden: int) -> ir.Model:
    """A sixteenth of the hidden channels is forty times the others: all copies are worth it."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    y = g("LayerNormalization", "x", np.full(WIDTH, 1.5), np.full(WIDTH, 0.1), axis=-1)
    weight = sample(WIDTH, hidden, seed=1) * 0.3
    weight[:, : hidden // 16] *= 40
    y = g("Gelu", g("Add", g("MatMul", y, weight), sample(hidden, seed=2)))
    y = g("Add", g("MatMul", y, sample(hidden, WIDTH, seed=3) * 0.3), sample(WIDTH, seed=4))
    model = g.model(g("Add", "x", y))
    fuse(model)
    return model


@pytest.mark.parametrize(
    ("hidden", "copies"),
    [(127, 0), (128, 16), (255, 16), (256, 32), (511, 32), (512, 64), (1024, 64)],
)
def test_copies_are_an_eighth_at_most_and_64(hidden: int, copies: int) -> None:
    assert [m.copies for m in moves(wide_mlp(hidden)).values() if m.into.startswith("Mul")] == [
        copies
    ]


def test_values_are_chosen_with_a_fifth_of_their_own_rounding() -> None:
    """By the module's formula; with none of it, or all, the factors and what they save differ."""
    found = moves(transformer(Choices()))["v"]
    assert found.into == "proj"
    assert found.gain_db == pytest.approx(1.7522, abs=1e-3)
    assert found.largest == pytest.approx(1.71514, abs=1e-4)
