"""The first arithmetic on the image goes into the convolution, or stays where that is not exact."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from small_graph import SmallGraph, run, sample

from ptq_onnx.fusion.normalisation import fold_normalisation

MEAN, FACTOR = sample(1, 3, 1, 1, seed=1), np.array([2.0, 3.0, 0.5]).reshape(1, 3, 1, 1)


def network(channels: int = 3, *, measured: bool = False) -> ir.Model:
    """(x - mean) · factor in front of patches; ``measured``: a Shape is taken in between."""
    g = SmallGraph(("b", channels, 8, 8))
    x = g("Sub", "x", MEAN)
    count = g("Cast", g("ReduceProd", g("Shape", x)), to=1) if measured else np.array(2.0)
    x = g("Conv", g("Mul", x, FACTOR), sample(4, 3, 4, 4, seed=2), strides=[4, 4])
    return g.model(g("Mul", x, count))


def test_folds_and_keeps_the_numbers() -> None:
    model, x = network(), sample(2, 3, 8, 8)
    (expected,) = run(model, x)
    assert fold_normalisation(model) == 1
    assert fold_normalisation(model) == 0
    assert [n.op_type for n in model.graph] == ["Conv", "Mul"]
    np.testing.assert_allclose(run(model, x)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_grey_image_spread_over_channels_stays() -> None:
    model, x = network(1), sample(2, 1, 8, 8)
    (expected,) = run(model, x)
    assert fold_normalisation(model) == 0
    np.testing.assert_array_equal(run(model, x)[0], expected)


def test_what_a_shape_is_taken_of_stays() -> None:
    model = network(measured=True)
    assert fold_normalisation(model) == 0
    assert [n.op_type for n in model.graph][:2] == ["Sub", "Shape"]
