"""Specs and rules: limits, labels, and a round trip through JSON that loses nothing."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.around.token_mean import TokenMean
from ptq_onnx.numerics.codes.log2 import Log2
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.grain import GRAINS, PerChannel, PowersOfTwo
from ptq_onnx.numerics.spec import Rule, Site, TensorSpec

FLOATS = st.floats(2.0**-90, 2.0**90, width=32)


@st.composite
def specs(draw: st.DrawFn) -> TensorSpec:
    """Scalar or per-axis scales, no factor, ratios or powers of two, all codes."""
    grain = draw(st.sampled_from(GRAINS))
    rows = [] if grain.per_channel else [(RowMaximum(),)]
    signed = draw(st.booleans())
    rule = Rule(
        bits=draw(st.integers(2, 8)),
        signed=signed,
        symmetric=draw(st.booleans()),
        grain=grain,
        code=draw(st.sampled_from([Uniform(), Log2()])),
        method=draw(st.sampled_from(["minmax", "robust", "fixed"])),
        around=draw(st.sampled_from([(), (TokenMean(),), (RowSums(),), *rows])),
    )
    shape = draw(st.sampled_from([(), (1,), (5,)]))
    scale = draw(npst.arrays(np.float32, shape, elements=FLOATS))
    zero = draw(npst.arrays(np.int32, shape, elements=st.integers(*rule.limits)))
    factor = None
    if grain.per_channel:
        sizes = draw(st.sampled_from([(4,), (3, 1, 4), (3, 4, 1)]))
        alpha = draw(npst.arrays(np.int32, sizes, elements=st.integers(-12, 12)))
        factor = np.exp2(alpha.astype(np.float32))
        if grain == PerChannel():
            factor = draw(npst.arrays(np.float32, sizes, elements=FLOATS))
    clip = draw(st.tuples(st.floats(-1e9, 0), st.floats(0, 1e9)))
    return TensorSpec("x/y:0", rule, scale, zero, 0 if shape == (5,) else None, factor, clip)


@given(specs())
def test_json_loses_nothing(spec: TensorSpec) -> None:
    data = json.loads(json.dumps(spec.to_json()))
    found = TensorSpec.from_json(spec.tensor, data)
    assert (found.tensor, found.rule, found.axis, found.clip) == (
        spec.tensor,
        spec.rule,
        spec.axis,
        spec.clip,
    )
    for name in ("scale", "zero_point", "factor", "alpha"):
        mine, theirs = getattr(spec, name), getattr(found, name)
        if mine is None:
            assert theirs is None
        else:
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            assert mine.tobytes() == theirs.tobytes()
    assert found.to_json() == spec.to_json()


def test_alpha_and_factor_in_json() -> None:
    """Exponents are written for PTF, ratios for channels, nothing for one scale."""
    alpha = np.array([[[0], [3], [7]]], np.int32)
    scale, zero = np.array(0.1, np.float32), np.array(3, np.int32)
    ptf = TensorSpec("x", Rule(grain=PowersOfTwo()), scale, zero, factor=np.exp2(alpha, dtype="f4"))
    assert ptf.to_json()["alpha"] == {"shape": [1, 3, 1], "values": [0, 3, 7]}
    assert "factor" not in ptf.to_json()
    np.testing.assert_array_equal(ptf.alpha, alpha)
    ratio = TensorSpec("x", Rule(grain=PerChannel()), scale, zero, factor=np.float32([0.5, 1]))
    assert ratio.to_json()["factor"] == {"shape": [2], "values": [0.5, 1.0]}
    assert ratio.alpha is None
    plain = ratio.with_factor(None)
    assert not {"alpha", "factor"} & set(plain.to_json())
    assert plain.scale is ratio.scale
    assert ratio.factor is not None


@pytest.mark.parametrize("key", ["bits", "scale", "clip", "renormalize"])
def test_missing_keys_are_refused(key: str) -> None:
    spec = TensorSpec("x", Rule(), np.array(1, np.float32), np.array(0, np.int32))
    data = spec.to_json()
    del data[key]
    with pytest.raises(KeyError, match=key):
        TensorSpec.from_json("x", data)


@pytest.mark.parametrize(
    ("bits", "signed", "limits"),
    [
        (8, True, (-128, 127)),
        (8, False, (0, 255)),
        (4, True, (-8, 7)),
        (4, False, (0, 15)),
        (2, True, (-2, 1)),
    ],
)
def test_limits(bits: int, signed: bool, limits: tuple[int, int]) -> None:
    assert Rule(bits, signed).limits == limits


@pytest.mark.parametrize(("bits", "last"), [(4, 15), (6, 63), (8, 126)])
def test_the_last_log2_code_is_in_the_report(bits: int, last: int) -> None:
    """It means zero, and is not 2^b - 1 where that would be less than any float32."""
    spec = TensorSpec("x", Rule(bits, False, False, code=Log2()), np.float32(1), np.array(0))
    assert spec.to_json()["limits"] == [0, last]


def test_exponents_are_of_powers_of_two_only() -> None:
    """Rounded exponents would be another factor than the file's."""
    rule = Rule(8, False, False, PowersOfTwo())
    for factor, key in ((np.float32([1, 4, 0.5]), "alpha"), (np.float32([1, 3, 0.7]), "factor")):
        spec = TensorSpec("x", rule, np.float32(1), np.array(0, np.int32), factor=factor)
        data = spec.to_json()
        assert ("alpha" in data, "factor" in data) == (key == "alpha", key == "factor")
        again = TensorSpec.from_json("x", data).factor
        assert again is not None
        np.testing.assert_array_equal(again, factor)


def test_labels() -> None:
    site = Site("t", "fc2", 3, (2,), ("batch", 4, 8), None, ())
    assert site.label == "blocks.3.fc2"
    assert Site("t", "head", None, (1,), ("batch", 4), None, ()).label == "head"
