"""One function for "spec → values": as the formula, as the file, and as torch, for every kind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_graph import SmallGraph, run, sample

from ptq_onnx.engine.torch_ops import fake_quantize as in_torch
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.around.token_mean import TokenMean
from ptq_onnx.numerics.codes.e4m3 import E4m3, e4m3_values
from ptq_onnx.numerics.codes.log2 import Log2
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.fake_quantize import clipped, dequantize, fake_quantize, quantize, reach
from ptq_onnx.numerics.grain import Blocks, PerChannel, PowersOfTwo
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.lowering import lower

SHAPE = (2, 3, 6, 8)


def spec(rule: Rule, scale: float, zero: int = 0, factor: np.ndarray | None = None) -> TensorSpec:
    scales = np.asarray(scale, np.float32)
    return TensorSpec("identity0", rule, scales, np.asarray(zero, np.int32), factor=factor)


def factors(ptf: bool) -> np.ndarray:
    if ptf:
        return np.exp2(np.arange(8) % 4).astype(np.float32)
    return np.linspace(0.1, 1, 8).astype(np.float32)


ROW, MEAN = (RowMaximum(),), (TokenMean(),)
UNSIGNED = Rule(8, signed=False, symmetric=False)
TORCH = ("tensor", "signed", "6 bits", "3 bits signed", "channel", "ptf")
KINDS = {
    "tensor": spec(UNSIGNED, 0.03, 90),
    "signed": spec(Rule(8, stored="int8"), 0.03),
    "6 bits": spec(replace(UNSIGNED, bits=6), 0.11, 25),
    "3 bits signed": spec(Rule(3), 0.8),
    "channel": spec(replace(UNSIGNED, grain=PerChannel()), 0.03, 120, factors(False)),
    "ptf": spec(replace(UNSIGNED, grain=PowersOfTwo()), 0.004, 120, factors(True)),
    "ptf, 6 bits": spec(replace(UNSIGNED, grain=PowersOfTwo(), bits=6), 0.016, 30, factors(True)),
    "row": spec(Rule(8, False, False, method="fixed", around=ROW), 1 / 255),
    "row, 4 bits": spec(Rule(4, False, False, method="fixed", around=ROW), 1 / 15),
    "row, signed": spec(Rule(8, method="fixed", around=ROW, stored="int8"), 1 / 127),
    "centred": spec(Rule(8, stored="int8", around=MEAN), 0.02),
    "centred, 5 bits": spec(Rule(5, stored="int8", around=MEAN), 0.15),
    "log2": spec(Rule(8, False, False, code=Log2(), method="fixed"), 1.0),
    "log2, 4 bits": spec(Rule(4, False, False, code=Log2(), method="fixed"), 1.0),
    "e4m3": spec(Rule(8, code=E4m3()), 0.01),
}


def data(name: str) -> np.ndarray:
    """Attention maps for what holds them; else values of which some are clipped."""
    x = 2 * sample(*SHAPE, seed=4)
    if name.startswith(("row", "log2")):
        e = np.exp(x.astype(np.float64))
        return (e / e.sum(-1, keepdims=True)).astype(np.float32)
    return x + np.float32(1.5) if name.startswith("centred") else x


def formula(x: np.ndarray, one: TensorSpec) -> tuple[np.ndarray, np.ndarray]:
    """Values, and which are clipped, in float64, by the definitions in ``spec.py``."""
    v = x.astype(np.float64)
    if one.rule.code == Log2():
        with np.errstate(divide="ignore"):
            t = np.rint(1 / v)
        code = np.floor(np.log2(t)) + (t >= 1.5 * 2.0 ** np.floor(np.log2(t)))
        top = min(2**one.rule.bits - 1, 126)
        return np.where(code >= top, 0, 2.0**-code), np.zeros(x.shape, bool)
    top, mean = np.ones((1,)), np.zeros((1,))
    if one.rule.around == ROW:
        top = v.max(-1, keepdims=True)
    step = np.asarray(one.scale, np.float64)
    if one.rule.around == MEAN:
        mean = np.rint(v / step).mean(-2, keepdims=True) * step
    factor = 1 if one.factor is None else one.factor.astype(np.float64)
    left = (v - mean) / top
    if one.rule.code == E4m3():
        grid = np.unique(e4m3_values(np.arange(256, dtype=np.int32)))
        grid = grid[np.isfinite(grid)].astype(np.float64)
        nearest = np.abs(left[..., None] / step - grid).argmin(-1)
        return grid[nearest] * step, np.abs(left) > 464 * step
    low, high = one.rule.limits
    code = np.rint(left / factor / step) + int(one.zero_point)
    held = (np.clip(code, low, high) - int(one.zero_point)) * step * factor
    return held * top + mean, (code < low) | (code > high)


@pytest.mark.parametrize("name", KINDS)
def test_as_the_formula(name: str) -> None:
    x, one = data(name), KINDS[name]
    expected, outside = formula(x, one)
    found = fake_quantize(x, one)
    step = float(np.max(one.scale)) * (1 if one.factor is None else one.factor.max())
    # On a tie of two codes float32 may take the other.
    off = np.abs(found - expected) > 1e-5
    assert off.mean() <= 2e-3
    assert np.abs(found - expected).max() <= 1.01 * step or one.rule.code != Uniform()
    assert np.mean(clipped(x, one) != outside) <= 2e-3
    if name in ("6 bits", "3 bits signed", "centred, 5 bits", "channel"):
        assert outside.any()
    low, high = reach(one)
    if not (one.rule.around == MEAN or one.rule.around == ROW):
        assert low - 1e-6 <= found.min()
        assert found.max() <= high + 1e-6


@pytest.mark.parametrize("name", [k for k in KINDS if k != "e4m3"])
def test_as_the_file(name: str) -> None:
    x, one = data(name), KINDS[name]
    g = SmallGraph(SHAPE, opset=20)
    model = g.model(g("Identity", "x"))
    (expected,) = run(graphs.to_standard(lower(model, {"identity0": one})), x)
    np.testing.assert_allclose(fake_quantize(x, one), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", [k for k in KINDS if k.split(",")[0] in TORCH])
def test_as_torch(name: str) -> None:
    x, one = data(name), KINDS[name]
    found = in_torch(torch.from_numpy(x), one).numpy()
    np.testing.assert_allclose(fake_quantize(x, one), found, rtol=2e-6, atol=1e-6)


def test_gradients_pass_the_rounding_and_stop_where_values_are_clipped() -> None:
    one = KINDS["6 bits"]
    x = torch.from_numpy(data("6 bits")).requires_grad_()
    in_torch(x, one).sum().backward()
    outside = formula(data("6 bits"), one)[1]
    assert x.grad is not None
    assert 0 < outside.mean() < 1
    np.testing.assert_allclose(x.grad.numpy(), np.where(outside, 0, 1), atol=1e-6)


def test_weights_per_channel_with_factors_and_in_blocks() -> None:
    weight = sample(40, 6, seed=2)
    scale = np.linspace(0.01, 0.05, 6).astype(np.float32)
    rows = np.exp2(np.arange(40) % 3).astype(np.float32)[:, None]
    one = TensorSpec(
        "w", Rule(8, grain=PerChannel()), scale, np.zeros(6, np.int32), axis=1, factor=rows
    )
    real = weight.astype(np.float64) / rows / scale
    expected = np.clip(np.rint(real), -128, 127) * scale * rows
    np.testing.assert_allclose(fake_quantize(weight, one), expected, rtol=1e-5, atol=1e-6)
    assert reach(one) == pytest.approx((-128 * 0.05 * 4, 127 * 0.05 * 4))
    blocks = np.linspace(0.2, 0.4, 12).reshape(2, 6).astype(np.float32)
    zero = np.arange(12, dtype=np.int32).reshape(2, 6)
    four = TensorSpec("w", Rule(4, False, False, Blocks(32)), blocks, zero, axis=0)
    steps, points = (np.repeat(v, 32, axis=0)[:40].astype(np.float64) for v in (blocks, zero))
    codes = np.clip(np.rint(weight / steps) + points, 0, 15)
    np.testing.assert_allclose(
        fake_quantize(weight, four), (codes - points) * steps, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(
        clipped(weight, four),
        (weight / steps + points < -0.5) | (weight / steps + points > 15.5),
    )
    assert reach(four)[1] == pytest.approx(float(((15 - zero) * blocks).max()))


@pytest.mark.parametrize("name", KINDS)
def test_a_row_of_zeros_stays_finite(name: str) -> None:
    x = np.zeros(SHAPE, np.float32)
    found = fake_quantize(x, KINDS[name])
    assert np.isfinite(found).all()
    assert not clipped(x, KINDS[name]).any()


def test_values_of_codes() -> None:
    for name in ("tensor", "log2", "e4m3"):
        one = KINDS[name]
        x = data(name)
        if name != "log2":
            np.testing.assert_array_equal(dequantize(quantize(x, one), one), fake_quantize(x, one))
    assert dequantize(np.array([0, 1, 255], np.int32), KINDS["log2"]).tolist() == [1, 0.5, 0]
