"""Convolutions, gates, pools and what stands between them in integers: a hybrid's stem."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
import torch
from bit_exact import assert_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_steps import run as run_step
from small_graph import SmallGraph, sample
from small_transformer import TOKENS, WIDTH, Choices, _block
from test_integer_lowering import calibrated
from test_integer_plans import plan_of, spec
from test_integer_steps import SEEDS, fixed_point, grid, term

from ptq_onnx.errors import ModelError
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.preparation.cleaning import infer_shapes
from ptq_onnx.targets.integer.elementwise import GateStep, sigmoid
from ptq_onnx.targets.integer.products import ConvStep, largest_sum


@settings(max_examples=40, deadline=None)
@given(
    SEEDS,
    st.sampled_from([(1, 6, 8), (6, 6, 6), (2, 6, 4)]),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_convolutions_of_any_form(
    seed: int,
    sizes: tuple[int, int, int],
    pads: tuple[int, ...],
    strides: tuple[int, int],
    dilations: tuple[int, int],
) -> None:
    """Formula, ONNX Runtime and interpreter (``run_step``), and PyTorch in float64."""
    group, channels, outputs = sizes
    random = np.random.default_rng(seed)
    x = random.integers(0, 256, (2, channels, 9, 8)).astype(np.uint8)
    weight = random.integers(-128, 128, (outputs, channels // group, 3, 2))
    step = ConvStep(weight, 119, None, strides, pads, dilations, group)
    found = step(x.astype(np.int64))
    np.testing.assert_array_equal(run_step(step, x), found)
    top, left, bottom, right = pads
    filled = np.pad(x.astype(np.float64) - 119, ((0, 0), (0, 0), (top, bottom), (left, right)))
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(filled), torch.from_numpy(weight.astype(np.float64)), stride=strides,
        dilation=dilations, groups=group,
    )  # fmt: skip
    np.testing.assert_array_equal(found, expected.numpy())
    assert np.abs(found).max() <= largest_sum(weight, 119, (0, 255), 0, filled=any(pads))


def test_a_filled_up_sum_is_within_its_bound() -> None:
    """Codes that all lie above the zero: what is filled in may still leave a tap out."""
    weight = np.array([[100, -50]])
    assert largest_sum(weight, 10, (20, 255), 0) == 245 * 100 - 10 * 50
    assert largest_sum(weight, 10, (20, 255), 0, filled=True) == 245 * 100


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_a_gate(seed: int) -> None:
    random = np.random.default_rng(seed)
    one, other = grid(0.02, 128, random.integers(0, 4, 6)), grid(0.005, 7)
    x, y = (random.integers(0, 256, (3, 5, 6)).astype(np.uint8) for _ in range(2))
    bound = (128 << 3) * 248
    finish = fixed_point([np.array(0.02 * 0.005 / 0.01)], np.array(100.0), [bound], (0, 255))
    step = GateStep((term(one), term(other)), finish)
    found = step(x.astype(np.int64), y.astype(np.int64))
    np.testing.assert_array_equal(run_step(step, x, y), found)
    real = (x - 128.0) * one.scale * (y - 7.0) * other.scale / 0.01 + 100
    assert np.abs(found - np.clip(real, 0, 255)).max() <= 0.5 + 1e-5


@cache
def hybrid() -> ir.Model:
    """Two convolutions and a depthwise one with a gate of squeeze and excite → a block of a
    transformer → BatchNormalization → head."""
    g = SmallGraph(("batch", 3, 8, 12))
    x = g("Conv", "x", sample(8, 3, 3, 3) * 0.4, sample(8, seed=1), strides=[2, 2],
          pads=[1, 1, 1, 1])  # fmt: skip
    x = g("HardSwish", x)
    x = g("Conv", x, sample(8, 8, 2, 2, seed=2) * 0.4, sample(8, seed=3), strides=[2, 2])
    y = g("Conv", x, sample(8, 1, 3, 3, seed=4) * 0.6, sample(8, seed=5), group=8,
          pads=[1, 1, 1, 1])  # fmt: skip
    y = g("Mul", y, g("Sigmoid", y))
    pooled = g("GlobalAveragePool", y)
    gate = g("Relu", g("Conv", pooled, sample(4, 8, 1, 1, seed=6), sample(4, seed=7)))
    gate = g("Sigmoid", g("Conv", gate, sample(8, 4, 1, 1, seed=8), sample(8, seed=9)))
    x = g("Add", x, g("Mul", y, gate))
    x = g("Reshape", x, np.array([0, WIDTH, TOKENS]))
    x = _block(g, g("Transpose", x, perm=[0, 2, 1]), Choices(), 20)
    x = g("ReduceMean", x, np.array([1]), keepdims=0)
    scales = (np.linspace(0.5, 2, WIDTH), sample(WIDTH), sample(WIDTH, seed=1) * 0.1)
    x = g("BatchNormalization", x, *scales, np.linspace(0.3, 2, WIDTH))
    model = g.model(g("Add", g("MatMul", x, sample(WIDTH, 4)), sample(4, seed=2)))
    infer_shapes(model)
    fuse(model)
    infer_shapes(model)
    return model


def images(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (8, 3, 8, 12)).astype(np.float32)


@pytest.mark.parametrize("bits", ["8/8/8", "6/6/6"])
def test_a_hybrid_is_bit_exact_three_times(bits: str) -> None:
    model = hybrid()
    quantizer = calibrated(model, [images(0), images(1)], bits=bits)
    assert_exact(model, quantizer, images(2))


def test_tables_of_silu() -> None:
    g = SmallGraph((1, 5, 4))
    gate = g("Mul", "x", g("Sigmoid", "x"))
    (planned,) = plan_of(g, gate).steps.values()
    x = (np.arange(256) - 128) * np.float64(np.float32(0.05))
    expected = np.clip(np.rint(x * sigmoid(x) / np.float64(np.float32(0.05))) + 128, 0, 255)
    np.testing.assert_array_equal(planned.step.tables[0], expected)


def test_a_batch_normalisation_is_a_factor_and_a_shift() -> None:
    g = SmallGraph((2, 3, 4))
    gamma, beta, mean, variance = (np.array(v, np.float32) for v in (
        [1, 2, -1], [0.5, 0, 1], [0.1, 0, -0.2], [1, 4, 0.25]))  # fmt: skip
    out = g("BatchNormalization", "x", gamma, beta, mean, variance, epsilon=0.0)
    plan = plan_of(g, out, specs={out: spec(out, 0.1)})
    (planned,) = plan.steps.values()
    codes = np.random.default_rng(0).integers(0, 256, (2, 3, 4))
    real = (codes - 128) * 0.05
    shape = (3, 1)
    by = (gamma / np.sqrt(variance)).reshape(shape)
    expected = (real - mean.reshape(shape)) * by + beta.reshape(shape)
    found = (planned.step(codes) - 128) * 0.1
    assert np.abs(found - np.clip(expected, -12.8, 12.7)).max() <= 0.05 + 1e-5


def test_what_is_no_such_convolution() -> None:
    g = SmallGraph((1, 2, 8, 8))
    g("Conv", "x", sample(4, 2, 2, 2), sample(4), auto_pad="SAME_UPPER")
    with pytest.raises(ModelError, match="its padding follows the size of its input"):
        plan_of(g, "conv0")
    g = SmallGraph((1, 2, 8))
    g("Conv", "x", sample(4, 2, 2), sample(4))
    with pytest.raises(ModelError, match="only convolutions over two axes"):
        plan_of(g, "conv0")
