"""A tensor that is not finite is named before its sample misleads a search."""

from __future__ import annotations

import numpy as np
import pytest
from small_graph import SmallGraph, sample

from ptq_onnx.calibration.product_samples import Wanted, collect_samples
from ptq_onnx.calibration.row_samples import collect_rows
from ptq_onnx.errors import ModelError
from ptq_onnx.numerics.spec import Site


@pytest.mark.parametrize("op", ["Log", "Reciprocal"])
def test_it_is_named(op: str) -> None:
    """Log of -1 is NaN, 1 / 0 infinite; on the second batch alone."""
    g = SmallGraph(("b", 4, 8))
    bad = g(op, "x")
    model = g.model(g("MatMul", bad, sample(8, 8)))
    fine = np.ones((2, 4, 8), np.float32)
    wrong = fine * np.float32(-1 if op == "Log" else 0)
    wanted = Wanted({bad: (lambda x: x.reshape(-1, 8), None)}, {})
    rows, _ = collect_samples(model, wanted, [fine], threads=1)
    assert rows[bad].rows.shape == (8, 8)
    site = Site(bad, "norm1", 0, (2,), ("b", 4, 8), None, ())
    (kept,) = collect_rows(model, [site], [fine], threads=1)
    assert kept[bad].shape == (8, 8)
    text = f"Tensor '{bad}' is NaN or infinite on a calibration image"
    with pytest.raises(ModelError, match=text):
        collect_samples(model, wanted, [fine, wrong], threads=1)
    with pytest.raises(ModelError, match=text):
        list(collect_rows(model, [site], [fine, wrong], threads=1))
