"""Linears whose inputs or outputs are moved or turned: what they compute then, with and without a
bias, and with more rows than columns and fewer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run, sample

from ptq_onnx.equalization.linear_weights import move_rows, turn_columns, turn_rows
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.graph.expansions import to_standard

ANGLE = 0.4
TURN = np.array([[np.cos(ANGLE), np.sin(ANGLE)], [-np.sin(ANGLE), np.cos(ANGLE)]])
SHAPES = pytest.mark.parametrize(
    ("rows", "columns", "bias"), [(6, 4, True), (6, 4, False), (4, 6, True), (4, 6, False)]
)


def linear(rows: int, columns: int, bias: bool) -> tuple[ir.Model, ir.Node]:
    g = SmallGraph((3, rows))
    y = g("MatMul", "x", sample(rows, columns))
    model = g.model(g("Add", y, sample(columns, seed=1)) if bias else g("Neg", y))
    fuse(model)
    return model, next(n for n in model.graph if n.op_type == "Linear")


def computed(model: ir.Model, x: np.ndarray) -> np.ndarray:
    return run(to_standard(model), x.astype(np.float32))[0]


def turned(x: np.ndarray, heads: np.ndarray) -> np.ndarray:
    found = x.astype(np.float64)
    found[:, heads] = found[:, heads] @ TURN
    return found


@SHAPES
def test_inputs_that_have_moved(rows: int, columns: int, bias: bool) -> None:
    model, node = linear(rows, columns, bias)
    x, shift = sample(3, rows, seed=2), sample(rows, seed=3).astype(np.float64)
    factor = np.exp2(np.linspace(-2, 2, rows))
    before = computed(model, x)
    move_rows(model.graph, node, factor, shift)
    np.testing.assert_allclose(computed(model, (x - shift) / factor), before, atol=1e-5)


@SHAPES
def test_inputs_that_are_turned(rows: int, columns: int, bias: bool) -> None:
    model, node = linear(rows, columns, bias)
    x, heads = sample(3, rows, seed=2), np.arange(rows)[::-1].reshape(-1, 2)
    before = computed(model, x)
    turn_rows(model.graph, node, heads, TURN)
    np.testing.assert_allclose(computed(model, turned(x, heads)), before, atol=1e-5)


@SHAPES
def test_outputs_that_are_turned(rows: int, columns: int, bias: bool) -> None:
    model, node = linear(rows, columns, bias)
    x, heads = sample(3, rows, seed=2), np.arange(columns)[::-1].reshape(-1, 2)
    before = computed(model, x)
    turn_columns(model.graph, node, heads, TURN)
    np.testing.assert_allclose(computed(model, x), turned(before, heads), atol=1e-5)
