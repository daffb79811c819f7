"""Factors of a norm that leave γ whole multiples of one step: rounding it to codes loses none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_graph import SmallGraph, sample

from ptq_onnx.equalization.foldings import Norm, norm_before
from ptq_onnx.fusion.rules import fuse


def norm_of(gamma: np.ndarray) -> Norm:
    g = SmallGraph((2, 3, len(gamma)))
    normed = g("LayerNormalization", "x", gamma, np.zeros(len(gamma)), axis=-1)
    model = g.model(g("Add", g("MatMul", normed, sample(len(gamma), 4)), sample(4)))
    fuse(model)
    node = next(n for n in model.graph if n.op_type == "LayerNormalization")
    found = norm_before(node.outputs[0])
    assert found is not None
    return found


@given(st.integers(0, 10_000), st.sampled_from([15, 255]), st.sampled_from(["both", "+", "-"]))
def test_they_are_whole_multiples(seed: int, steps: int, sign: str) -> None:
    """Of the range from zero in so many steps; nearest to what was wanted, and none is zero."""
    rng = np.random.default_rng(seed)
    gamma = rng.normal(size=12).astype(np.float32)
    if sign != "both":
        gamma = np.abs(gamma) * (1 if sign == "+" else -1)
    factor = np.exp2(rng.uniform(-2, 2, 12))
    found = norm_of(gamma).on_grid(factor, steps)
    wanted, got = gamma / factor, gamma / found
    step = (max(0.0, *wanted) - min(0.0, *wanted)) / steps
    whole = got / step
    np.testing.assert_allclose(whole, np.rint(whole), atol=1e-6)
    assert np.abs(np.rint(whole)).min() >= 1
    assert (np.sign(got) == np.sign(gamma)).all()
    far = np.abs(got - wanted)
    assert (far <= step * (1 / 2 + 1e-6)).all() or (np.abs(wanted)[far > step / 2] < step).all()


def test_zeros_stay() -> None:
    factor = np.array([0.5, 2.0, 4.0])
    np.testing.assert_array_equal(norm_of(np.zeros(3, np.float32)).on_grid(factor, 15), factor)
    for gamma in ([1, 0, 2], [-1, 0, 2], [-1, 0, -2]):
        with np.errstate(all="raise"):
            found = norm_of(np.float32(gamma)).on_grid(factor, 15)
        assert found[1] == factor[1]
        wanted = np.array(gamma) / factor
        step = (max(0.0, *wanted) - min(0.0, *wanted)) / 15
        whole = np.array(gamma) / found / step
        np.testing.assert_allclose(whole, np.rint(wanted / step), atol=1e-9)


@pytest.mark.parametrize("steps", [1, 3])
def test_by_hand(steps: int) -> None:
    """2/1 and 3/2 on multiples of 2/steps."""
    found = norm_of(np.float32([2, 3])).on_grid(np.array([1.0, 2.0]), steps)
    expected = {1: [1, 1.5], 3: [1, 3 / (4 / 3)]}[steps]
    np.testing.assert_allclose(found, expected)
