"""The numbers that a rule gets from bounds: what the report publishes of them is what they mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq_onnx.numerics.fake_quantize import dequantize
from ptq_onnx.numerics.grain import PerChannel
from ptq_onnx.numerics.spec import Rule, Site, TensorSpec
from ptq_onnx.quantizers.solved_specs import channel_spec, tensor_spec, weight_spec

SITE = Site("x", "fc1", 0, (2,), ("batch", 5, 4), "n", ("m",))
ENDS = st.floats(-1e3, 1e3, width=32).filter(lambda v: abs(v) > 1e-3)


def edges(spec: TensorSpec) -> np.ndarray:
    """The values of the smallest and the largest code, without any factor."""
    codes = np.array(spec.rule.limits, np.int32)
    return dequantize(codes, spec.with_factor(None))


@pytest.mark.parametrize(("signed", "symmetric"), [(True, True), (False, False), (True, False)])
@given(one=ENDS, other=ENDS, bits=st.integers(2, 8))
def test_the_clip_range_is_what_the_codes_reach(
    signed: bool, symmetric: bool, one: float, other: float, bits: int
) -> None:
    rule = Rule(bits=bits, signed=signed, symmetric=symmetric)
    low, high = sorted((one, other))
    spec = tensor_spec(SITE, rule, low, high)
    np.testing.assert_allclose(spec.clip, edges(spec), rtol=1e-5, atol=1e-6)
    step = float(spec.scale)
    assert spec.clip[0] <= min(low, 0) + step
    assert spec.clip[1] >= max(high, 0) - step


@given(st.lists(st.tuples(ENDS, ENDS), min_size=4, max_size=4), st.booleans())
def test_of_channels_too(pairs: list[tuple[float, float]], symmetric: bool) -> None:
    ends = np.sort(np.array(pairs, np.float32), axis=1)
    rule = Rule(signed=symmetric, symmetric=symmetric, grain=PerChannel())
    spec = channel_spec(SITE, rule, ends[:, 0], ends[:, 1], (1, 1, 4))
    np.testing.assert_allclose(spec.clip, edges(spec), rtol=1e-5, atol=1e-6)
    assert spec.factor is not None
    reached = np.multiply.outer(spec.clip, spec.factor.ravel())
    step = float(spec.scale) * spec.factor.ravel()
    assert (reached[0] <= np.minimum(ends[:, 0], 0) + step).all()
    assert (reached[1] >= np.maximum(ends[:, 1], 0) - step).all()


def test_a_channel_of_zeros_has_the_largest_scale() -> None:
    """Its codes are zero with any scale; its bias, in steps of it, is a small number then."""
    weight = np.array([[0.5, 0.0, -2.0], [0.25, 0.0, 1.0]], np.float32)
    rule = Rule(bits=8, signed=True, grain=PerChannel())
    site = Site("w", "fc1.weight", 0, (1,), (2, 3), None, ("n",), is_parameter=True)
    spec = weight_spec(site, rule, weight, None, "any")
    np.testing.assert_allclose(spec.scale, np.array([0.5, 2.0, 2.0]) / 127, rtol=1e-6)
    whole = weight_spec(site, rule, np.zeros((2, 3), np.float32), None, "any")
    assert (whole.scale > 0).all()
