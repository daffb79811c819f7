"""Values without their tokens' mean: exact numbers, of arrays and of the file."""

from __future__ import annotations

import numpy as np
import pytest
from small_graph import SmallGraph, run, sample

from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.around.token_mean import TokenMean
from ptq_onnx.numerics.codes.e4m3 import E4m3
from ptq_onnx.numerics.codes.twin import Twin
from ptq_onnx.numerics.grain import grain_named
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.lowering import lower


def test_the_mean_is_of_whole_steps() -> None:
    """Steps of 0.5: 0.2, 0.3 and 1.1 are 0, 1 and 2, in the mean one."""
    x = np.float32([[[0.2], [0.3], [1.1]]])
    found = TokenMean().relative(x, np.float32(0.5))
    np.testing.assert_allclose(found.shift, [[[0.5]]])
    np.testing.assert_allclose(found.part, x - np.float32(0.5))
    assert found.factor == 1


def test_the_file_adds_it_behind_the_product() -> None:
    """A·V reads codes of V less its mean, as its second input; the mean is added to the result."""
    tokens = 4
    g = SmallGraph((2, tokens, 3))
    v = g("Identity", "x")
    scores = g("MatMul", "x", g("Transpose", "x", perm=[0, 2, 1]))
    model = g.model(g("MatMul", g("Softmax", scores, axis=-1), v))
    rule = Rule(8, True, True, around=(TokenMean(),), stored="int8")
    step = np.float32(1 / 64)
    lowered = lower(model, {v: TensorSpec(v, rule, step, np.int32(0))})
    product = [n for n in lowered.graph if n.op_type == "MatMul"][-1]
    assert product.inputs[1].producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]
    assert [u.node.op_type for u in product.outputs[0].uses()] == ["Add"]
    x = sample(2, tokens, 3)
    (found,) = run(graphs.to_standard(lowered), x)
    mean = (np.rint(x * 64) / 64).mean(axis=1, keepdims=True)
    maps = np.exp(x @ x.transpose(0, 2, 1))
    maps /= maps.sum(axis=-1, keepdims=True)
    codes = np.clip(np.rint((x - mean) * 64), -128, 127) / 64
    np.testing.assert_allclose(found, maps @ codes + mean, atol=1e-5)


def test_limits_of_eight_bit_floats() -> None:
    assert E4m3().limits(8, True) == (-448, 448)


def test_an_endless_table_is_no_twin() -> None:
    twin = Twin()
    assert twin.recognise(np.float32([0, 1, 0, 4]))
    for other in ([0, 1, 0, np.inf], [0, 1, 0], [0, 1, 0, 3], [0, 1, 0, 1], [0, 0, 0, 1],
                  [0, 1, 0, 4, 8, 9], [0, 1], [0, 4, 0, 1]):  # fmt: skip
        assert not twin.recognise(np.float32(other)), other
    assert twin.recognise(np.float32([-2, -1, 0, 8]))
    assert not twin.recognise(np.float32([-2, -1, 0, np.inf]))


def test_row_sums_of_nothing_divide_by_one() -> None:
    values = np.float32([[0, 0], [0.5, 0.5], [2, 2], [0.25, 0.25]])
    found = RowSums().behind(np.full((4, 1), 3, np.float32), values)
    np.testing.assert_array_equal(found, [[3], [3], [0.75], [6]])


def test_long_names_are_cut_at_40_letters() -> None:
    with pytest.raises(ValueError, match=f"no granularity '{'x' * 40}'$"):
        grain_named("x" * 50)
