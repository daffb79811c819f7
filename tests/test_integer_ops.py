"""The simulator's integer arithmetic (torch) is the reference (NumPy), to the last bit."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graph import SmallGraph

from ptq_onnx.errors import ConfigError
from ptq_onnx.integer_ops import (
    LayerNormOverride,
    SoftmaxOverride,
    floor_divide,
    integer_overrides,
)
from ptq_onnx.quantizers.integer import IntegerSoftmax
from ptq_onnx.spec import Rule, TensorSpec

UINT8 = Rule(8, signed=False, symmetric=False)


def spec(scale: float, zero: int, rule: Rule = UINT8, factor: object = None) -> TensorSpec:
    array = None if factor is None else np.asarray(factor, np.float32)
    return TensorSpec("t", rule, np.array(scale, np.float32), np.array(zero), factor=array)


@settings(max_examples=60)
@given(
    st.floats(2.0**-30, 512.0), st.sampled_from([4, 8]), st.booleans(), st.integers(0, 2**32 - 1)
)
def test_softmax(scale: float, bits: int, log2: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0, 128)
    codes = np.clip(np.rint(rng.normal(0, spread, (20, 65))), -128, 127).astype(np.int64)
    rule = Rule(bits, False, False, code="log2" if log2 else "uniform")
    override = SoftmaxOverride(spec(scale, 0, Rule()), spec(1, 0, rule))
    expected = IntegerSoftmax(float(np.float32(scale)), bits, log2)(codes)
    found = override.codes(torch.from_numpy(codes)).numpy()
    np.testing.assert_array_equal(found, expected)


def norm_node(channels: int, seed: int, epsilon: float = 1e-6) -> ir.Node:
    rng = np.random.default_rng(seed)
    g = SmallGraph(("batch", 4, channels))
    gamma, beta = rng.normal(1, 0.5, channels), rng.normal(0, 1, channels)
    out = g("LayerNormalization", "x", gamma, beta, axis=-1, epsilon=epsilon)
    return next(iter(g.model(out).graph))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 200),
    st.sampled_from([None, 3, 7, 12]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_layer_norm(channels: int, max_alpha: int | None, wide: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ptf = Rule(8, False, False, "ptf")
    factor = None if max_alpha is None else np.exp2(rng.integers(0, max_alpha + 1, channels))
    before = spec(float(rng.uniform(1e-3, 0.2)), int(rng.integers(0, 256)), ptf, factor)
    out_factor = np.exp2(rng.integers(0, 4, channels)) if wide else None
    after = spec(float(rng.uniform(0.01, 0.1)), 128, ptf, out_factor)
    override = LayerNormOverride(norm_node(channels, seed), before, after)
    codes = rng.integers(0, 256, (10, channels))
    expected = override.constants(channels)(codes)
    found = override.codes(torch.from_numpy(codes)).numpy()
    np.testing.assert_array_equal(found, expected)
    x = torch.from_numpy((codes - int(before.zero_point)) * before.scale).float()
    if factor is not None:
        x = x * torch.from_numpy(factor).float()
    values = override([x]).numpy()
    steps = after.scale * (1 if out_factor is None else out_factor.astype(np.float32))
    np.testing.assert_allclose(values, (expected - 128) * steps, rtol=1e-6)


def test_layer_norm_in_floats_is_near_the_float_one() -> None:
    rng = np.random.default_rng(0)
    node = norm_node(64, 0, epsilon=1e-3)
    before, after = spec(0.02, 128), spec(0.03, 128)
    x = torch.from_numpy(rng.integers(-128, 128, (50, 64))).float() * 0.02
    gamma, beta = (torch.tensor(v.const_value.numpy()) for v in node.inputs[1:])  # type: ignore[union-attr]
    expected = torch.nn.functional.layer_norm(x, (64,), gamma, beta, 1e-3)
    expected = expected.clamp(-128 * 0.03, 127 * 0.03)
    assert (LayerNormOverride(node, before, after)([x]) - expected).abs().max() <= 0.5 * 0.03 * 1.05


@settings(max_examples=300)
@given(st.integers(0, 2**52 - 1), st.integers(1, 2**40))
def test_floor_divide_is_exact(a: int, b: int) -> None:
    for numerator in (a, a - a % b, max(a - a % b - 1, 0)):
        found = floor_divide(torch.tensor([numerator]), torch.tensor([b]))
        assert int(found[0]) == numerator // b


def small() -> tuple[ir.Model, dict[str, str]]:
    g = SmallGraph(("batch", 4, 8))
    norm = g("LayerNormalization", "x", np.ones(8), np.zeros(8), axis=-1)
    softmax = g("Softmax", norm, axis=-1)
    out = g("Relu", softmax)
    return g.model(out), {"norm": norm, "softmax": softmax}


def test_overrides_of_a_graph() -> None:
    """Both ops between quantized tensors; one whose output stays in float is told."""
    model, names = small()
    log2 = Rule(4, False, False, code="log2")
    specs = {
        "x": spec(0.1, 128),
        names["norm"]: spec(0.05, 128),
        names["softmax"]: spec(1, 0, log2),
    }
    found, left = integer_overrides(model, specs)
    assert sorted(type(v).__name__ for v in found.values()) == [
        "LayerNormOverride",
        "SoftmaxOverride",
    ]
    assert left == []
    del specs[names["softmax"]]
    found, left = integer_overrides(model, specs)
    assert len(found) == len(left) == 1


def test_free_factors_are_refused() -> None:
    model, names = small()
    ratio = spec(0.1, 128, Rule(8, False, False, "channel"), np.linspace(0.1, 1, 8))
    found, _ = integer_overrides(model, {"x": ratio, names["norm"]: spec(0.05, 128)})
    with pytest.raises(ConfigError, match="power-of-two factors"):
        next(iter(found.values()))([torch.zeros(1, 4, 8)])
