"""Places of one tensor that an integer machine gives one grid."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, sample
from test_integer_lowering import calibrated, run

from ptq_onnx.calibration.statistics import ChannelStatistics
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.quantizers.shared_codes import joined, places_of_one
from ptq_onnx.targets.integer.interpreter import differing_tensors
from ptq_onnx.targets.integer.lowering import lower_integer
from ptq_onnx.targets.integer.rules import violations


@cache
def distilled() -> ir.Model:
    """Two heads that read a token each of one norm, as DeiT's; their mean."""
    g = SmallGraph(("batch", 6, 8))
    x = g("Add", "x", g("Add", g("MatMul", "x", sample(8, 8)), sample(8, seed=1)))
    scale = np.linspace(0.5, 4, 8)
    x = g("LayerNormalization", x, scale, np.full(8, 0.1), axis=-1)
    logits = [
        g("Add", g("MatMul", g("Gather", x, np.array(i), axis=1), sample(8, 4, seed=2 + i)),
          sample(4, seed=4 + i))
        for i in range(2)
    ]  # fmt: skip
    model = g.model(g("Mul", g("Add", *logits), 0.5))
    fuse(model)
    return model


def batches() -> list[np.ndarray]:
    """The second token is twice as large."""
    x = np.random.default_rng(0).normal(0, 1, (16, 6, 8)).astype(np.float32)
    return [x[:8], x[8:]]


@pytest.mark.parametrize("options", [{}, {"method": "percentile"}, {"method": "minmax"}], ids=str)
def test_heads_of_two_tokens_are_bit_exact(options: dict[str, Any]) -> None:
    model = distilled()
    quantizer = calibrated(model, batches(), **options)
    ((one, other),) = places_of_one(model.graph, quantizer.plan.sites)
    specs = quantizer.specs
    assert specs[one].factor is None
    assert (specs[one].scale, specs[one].zero_point) == (
        specs[other].scale,
        specs[other].zero_point,
    )
    file = lower_integer(model, specs)
    assert violations(file) == []
    _, different, _ = differing_tensors(ir.to_proto(file), batches())
    assert different == []
    plain, found = (run(m, batches()[0]).astype(np.float64) for m in (model, file))
    assert 10 * np.log10((plain**2).sum() / ((plain - found) ** 2).sum()) > 25


def test_the_range_of_both_is_that_of_either() -> None:
    low, high = (np.array([[-1.0, -4.0], [-0.5, -3.0]]), np.array([[2.0, 1.0], [1.5, 0.5]]))
    parts = []
    for column in range(2):
        found = ChannelStatistics.empty((1,))
        ends = (a[:, [column]].astype(np.float32) for a in (low, high))
        found.update(*ends, np.ones(1), np.array([column]), 7)
        parts.append(found)
    both = joined(parts)
    assert (both.lowest[:2, 0].tolist(), both.highest[:2, 0].tolist()) == ([-4, -3], [2, 1.5])
    assert (both.power.tolist(), both.total.tolist(), both.count) == ([2], [1], 14)


def test_other_channels_are_no_such_places() -> None:
    """q, k and v out of one linear."""
    g = SmallGraph(("batch", 6, 8))
    packed = g("Add", g("MatMul", "x", sample(8, 24)), sample(24, seed=1))
    q = g("Split", packed, np.array([8, 8, 8]), axis=2, outputs=3)
    logits = g("Softmax", g("MatMul", q, g("Transpose", f"{q}_1", perm=[0, 2, 1])), axis=-1)
    out = g("MatMul", g("MatMul", logits, f"{q}_2"), sample(8, 4))
    model = g.model(out)
    fuse(model)
    quantizer = calibrated(model, batches())
    assert places_of_one(model.graph, quantizer.plan.sites) == ()
