"""Where codes are made behind layout ops, the op that computes the tensor makes them already."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_graph import SmallGraph, sample
from test_integer_plans import plan_of, spec

from ptq_onnx.errors import ModelError
from ptq_onnx.numerics.grain import PowersOfTwo
from ptq_onnx.numerics.spec import Rule

PTF = Rule(8, False, False, PowersOfTwo())
NARROW = Rule(4, signed=False, symmetric=False)
SCALE = np.float64(np.float32(0.05))


def planned(plan: Any, op: str) -> Any:
    (found,) = [one for node, one in plan.steps.items() if node.op_type == op]
    return found


@pytest.mark.parametrize("batch", [1, "batch"])
def test_a_product_s_columns(batch: int | str) -> None:
    """The factors of its last axis, whatever becomes of the others."""
    g = SmallGraph((batch, 2, 5, 5))
    made = g("MatMul", g("Relu", "x"), g("Erf", "x"))
    turned = g("Transpose", made, perm=[0, 2, 1, 3])
    factor = np.float32([1, 2, 4, 8, 2])
    specs = {made: None, turned: spec(turned, 0.05, 120, factor, PTF), "x": spec("x", zero=0)}
    specs |= {name: spec(name, zero=0) for name in ("relu0", "erf1")}
    found = planned(plan_of(g, g("Erf", turned), specs=specs), "MatMul").made
    np.testing.assert_allclose(found.scale, SCALE * factor)
    np.testing.assert_array_equal(found.zero, np.full(5, 120))
    assert (found.low, found.high) == (0, 255)


def test_a_linear_s_columns_and_a_convolution_s_channels() -> None:
    factor = np.float32([1, 2, 4])
    g = SmallGraph((1, 6, 4))
    made = g("Add", g("MatMul", "x", sample(4, 3)), sample(3, seed=1))
    turned = g("Reshape", made, np.array([1, 2, 3, 3]))
    specs = {made: None, turned: spec(turned, 0.05, 7, factor, PTF)}
    found = planned(plan_of(g, g("Erf", turned), specs=specs), "Linear").made
    np.testing.assert_allclose(found.scale, SCALE * factor)
    g = SmallGraph((1, 2, 8, 8))
    made = g("Conv", "x", sample(3, 2, 2, 2), sample(3), strides=[2, 2])
    turned = g("Transpose", made, perm=[0, 2, 3, 1])
    specs = {made: None, turned: spec(turned, 0.05, 7, factor, PTF)}
    found = planned(plan_of(g, g("Erf", turned), specs=specs), "Conv").made
    np.testing.assert_allclose(found.scale, (SCALE * factor).reshape(3, 1, 1))
    np.testing.assert_array_equal(found.zero, np.full((3, 1, 1), 7))


@pytest.mark.parametrize("narrow", [0, 1])
def test_parts_of_several_widths_are_refused(narrow: int) -> None:
    """Whichever has fewer bits."""
    g = SmallGraph((1, 5, 4))
    parts = g("Split", g("Add", g("MatMul", "x", sample(4, 8)), sample(8)), axis=-1, outputs=2,
              num_outputs=2)  # fmt: skip
    ends = [g("Erf", parts), g("Erf", f"{parts}_1")]
    name = (parts, f"{parts}_1")[narrow]
    with pytest.raises(ModelError, match="one of its channels is quantized in two ways"):
        plan_of(g, *ends, specs={"add1": None, name: spec(name, zero=8, rule=NARROW)})


@pytest.mark.parametrize(
    ("change", "fits"),
    [({}, True), ({"scale": 0.06}, False), ({"zero": 127}, False)],
    ids=["alike", "scale", "zero point"],
)
@pytest.mark.parametrize("first", [True, False])
def test_channels_that_two_places_read(change: dict[str, Any], fits: bool, first: bool) -> None:
    """With one scale and one zero point."""
    g = SmallGraph((1, 5, 4))
    made = g("Add", g("MatMul", "x", sample(4, 8)), sample(8))
    one, other = (
        g("Slice", made, np.array([a]), np.array([b]), np.array([2])) for a, b in ((0, 6), (4, 8))
    )
    ends = [g("Erf", one), g("Erf", other)]
    name = one if first else other
    specs = {made: None, name: spec(name, **change)}
    if not fits:
        with pytest.raises(ModelError, match="one of its channels is quantized in two ways"):
            plan_of(g, *ends, specs=specs)
        return
    found = planned(plan_of(g, *ends, specs=specs), "Linear").made
    np.testing.assert_allclose(found.scale, np.full(8, SCALE))


@pytest.mark.parametrize("factor", [[2, 2, 2, 2], [1, 2, 1, 2], [1, 2, 4, 2]], ids=str)
def test_a_table_for_each_pair_of_scales(factor: list[int]) -> None:
    """One, two or three: each channel has its own."""
    g = SmallGraph((1, 5, 4))
    read = g("Erf", "x")
    out = g("Relu", read)
    specs = {read: spec(read, 0.05, 120, np.float32(factor), PTF), out: spec(out, 0.06, 3)}
    step = planned(plan_of(g, out, specs=specs), "Relu").step
    assert len(step.tables) == len(set(factor))
    assert step.pair.shape == ((4,) if len(set(factor)) > 1 else ())
    codes = np.arange(256)[:, None] + np.zeros(4, np.int64)
    real = np.maximum(codes - 120, 0) * (0.05 * np.array(factor))
    expected = np.clip(np.rint(real / 0.06) + 3, 0, 255)
    assert np.abs(step(codes) - expected).max() <= 1
    assert (step(codes) == expected).mean() > 0.99
