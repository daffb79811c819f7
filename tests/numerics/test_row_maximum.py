"""Rows by their maximum: exact numbers, of arrays and of the file."""

from __future__ import annotations

import numpy as np
from small_graph import SmallGraph, run

from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.lowering import lower

ROWS = np.float32([[[1, 2, 4], [8, 2, 0], [0, 0, 0], [0.5, 0.25, 0.125]]])


def test_each_row_by_its_own() -> None:
    """A maximum over another axis gives other numbers: no row's is its columns'."""
    found = RowMaximum().relative(ROWS, np.float32(1))
    np.testing.assert_array_equal(np.ravel(found.factor), [4, 8, 1, 0.5])
    parts = [[[0.25, 0.5, 1], [1, 0.25, 0], [0, 0, 0], [1, 0.5, 0.25]]]
    np.testing.assert_array_equal(found.part, parts)
    np.testing.assert_array_equal(found.part * found.factor + found.shift, ROWS)


def test_a_file_holds_every_row_on_all_levels() -> None:
    """With 2 bits a row's levels are its thirds: 4 · {0, 1/3, 2/3, 1}, 8 · …"""
    rule = Rule(2, False, False, method="fixed", around=(RowMaximum(),))
    spec = TensorSpec("identity0", rule, np.float32(1 / 3), np.int32(0))
    g = SmallGraph(ROWS[:, [0, 1, 3]].shape)
    model = lower(g.model(g("Identity", "x")), {"identity0": spec})
    (found,) = run(graphs.to_standard(model), ROWS[:, [0, 1, 3]])
    # 2 and 0.25 are half of their rows: the tie of codes 1 and 2 goes to the even one
    expected = [[[4, 8, 12], [24, 8, 0], [1.5, 1, 0.5]]]
    np.testing.assert_allclose(found, np.float32(expected) / 3, rtol=1e-6)


def test_a_product_divided_by_row_sums_is_not_given_the_row_s_maximum_back() -> None:
    """(a / m) V / Σ(a / m) has no m left; a reader that is no product still gets a."""
    rule = Rule(8, False, False, method="fixed", around=(RowMaximum(), RowSums()))
    spec = TensorSpec("identity0", rule, np.float32(1 / 255), np.int32(0))
    a = ROWS[:, [0, 1, 3]]
    for behind in (True, False):
        g = SmallGraph(a.shape)
        read = g("Identity", "x")
        values = g("Transpose", "x", perm=[0, 2, 1])
        out = g("MatMul", read, values) if behind else g("Neg", read)
        model = lower(g.model(out), {"identity0": spec})
        (found,) = run(graphs.to_standard(model), a)
        by = a.sum(axis=-1, keepdims=True)
        expected = a @ a.transpose(0, 2, 1) / by if behind else -a
        np.testing.assert_allclose(found, expected, rtol=2e-2)
