"""Rounding of weights by the error of the outputs: on arrays, and in a small transformer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_graph import run, sample
from small_transformer import Choices, transformer

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization.equalize import equalise
from ptq_onnx.errors import ConfigError
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.fake_quantize import dequantize, quantize
from ptq_onnx.numerics.rounding import (
    adaround,
    descended,
    gptq,
    gptq_ranged,
    limits,
    loss,
    nearest,
    shrunk,
)
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.numerics.weights import weight_scale
from ptq_onnx.preparation.model_files import to_standard
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer
from ptq_onnx.quantizers.importance import importance_of_inputs

METHODS = [gptq, adaround]
Method = Callable[..., np.ndarray]


def correlated(channels: int, rows: int = 2000, common: int = 4, seed: int = 0) -> np.ndarray:
    """Second moments of rows that are mostly a mixture of a few directions."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, common)) @ random.normal(size=(common, channels))
    x += 0.3 * random.normal(size=(rows, channels))
    return np.asarray(x.T @ x / rows)


def layer(channels: int, outputs: int, bits: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A weight and its scale."""
    weight = sample(channels, outputs, seed=seed)
    return weight, weight_scale(weight, 1, bits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("channels", [40, 200])
def test_correlated_inputs_halve_the_loss(method: Method, bits: int, channels: int) -> None:
    """More than a block of channels, and less."""
    weight, scale = layer(channels, 24, bits)
    moments = correlated(channels)
    codes = method(weight, scale, moments, bits)
    before = loss(weight, scale, moments, nearest(weight, scale, bits))
    after = loss(weight, scale, moments, codes)
    assert codes.dtype == np.int8
    assert limits(bits)[0] <= codes.min()
    assert codes.max() <= limits(bits)[1]
    assert np.all(after <= before)
    assert after.sum() < 0.5 * before.sum()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("diagonal", [np.full(30, 7.0), np.linspace(0.1, 5, 30)])
def test_inputs_that_are_not_correlated_leave_the_nearest(
    method: Method, diagonal: np.ndarray
) -> None:
    weight, scale = layer(30, 9, 8)
    codes = method(weight, scale, np.diag(diagonal), 8)
    np.testing.assert_array_equal(codes, nearest(weight, scale, 8))


@pytest.mark.parametrize("method", METHODS)
def test_channels_without_input(method: Method) -> None:
    """They keep the nearest code, and make nothing infinite."""
    weight, scale = layer(20, 5, 4)
    moments = correlated(20)
    dead = [0, 7, 19]
    moments[dead] = 0
    moments[:, dead] = 0
    codes = method(weight, scale, moments, 4)
    np.testing.assert_array_equal(codes[dead], nearest(weight, scale, 4)[dead])
    nothing = method(weight, scale, np.zeros((20, 20)), 4)
    np.testing.assert_array_equal(nothing, nearest(weight, scale, 4))


@pytest.mark.parametrize("method", METHODS)
def test_weights_at_the_ends(method: Method) -> None:
    """All zero, all at the largest code, and one channel alone."""
    moments = correlated(12)
    zero = np.zeros((12, 3), np.float32)
    assert not method(zero, weight_scale(zero, 1, 8), moments, 8).any()
    full = np.ones((12, 3), np.float32)
    codes = method(full, weight_scale(full, 1, 8), moments, 8)
    np.testing.assert_array_equal(codes, np.full((12, 3), 127))
    weight, scale = layer(1, 3, 8)
    assert method(weight, scale, np.ones((1, 1)), 8).shape == (1, 3)


def test_gptq_is_the_greedy_optimum() -> None:
    """For two channels, by hand: the second takes over H[0,1]/H[1,1] of the first's error."""
    weight = np.array([[0.4], [0.3]], np.float32)
    scale = np.ones(1, np.float32)
    moments = np.array([[1.0, 0.9], [0.9, 0.99]])
    # nearest: 0, 0, error (-0.4, -0.3). Behind 0 for the first: 0.3 + 0.4 · 0.9 / 1 → 1.
    np.testing.assert_array_equal(gptq(weight, scale, moments, 8), [[0], [1]])


def test_moments_without_an_inverse() -> None:
    """Fewer rows than channels, one direction only, and nearly indefinite."""
    weight, scale = layer(64, 8, 8)
    for moments in (np.ones((64, 64)), correlated(64, rows=5), correlated(64) - 0.05 * np.eye(64)):
        codes = gptq(weight, scale, moments, 8)
        assert np.all(
            loss(weight, scale, moments, codes)
            <= loss(weight, scale, moments, nearest(weight, scale, 8))
        )


@pytest.mark.parametrize("zero", [None, np.arange(3, 13, dtype=np.int32)])
def test_no_code_alone_can_be_better_after_the_descent(zero: np.ndarray | None) -> None:
    weight, scale = layer(24, 10, 4)
    moments = correlated(24)
    start = nearest(weight, scale, 4, zero)
    codes = descended(weight, scale, moments, 4, start, zero)
    best = loss(weight, scale, moments, codes)
    assert np.all(best <= loss(weight, scale, moments, start))
    assert best.sum() < 0.8 * loss(weight, scale, moments, start).sum()
    for channel in range(24):
        for step in (-1, 1):
            other = codes.copy()
            other[channel] = np.clip(other[channel] + step, *limits(4, zero))
            assert np.all(loss(weight, scale, moments, other) >= best * (1 - 1e-9))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ranges_are_judged_by_what_their_codes_lose(bits: int) -> None:
    """An outlier in every column, and one of them all on one side."""
    weight, scale = layer(48, 12, bits)
    weight[5] *= 6
    weight[:, 3] = np.abs(weight[:, 3])
    moments = correlated(48)
    scale = weight_scale(weight, 1, bits, power=np.diag(moments).copy())
    found, zero, codes = gptq_ranged(weight, moments, bits)
    plain = loss(weight, scale, moments, gptq(weight, scale, moments, bits))
    mine = loss(weight, found, moments, codes)
    assert mine.sum() < 0.9 * plain.sum()
    assert mine[3] < 0.5 * plain[3]  # its codes count from zero
    assert zero[3] == 0
    assert found.dtype == np.float32
    assert (codes + zero).min() >= 0
    assert (codes + zero).max() < 1 << bits
    assert mine.sum() <= loss(weight, found, moments, nearest(weight, found, bits, zero)).sum()


def test_columns_of_nothing_and_of_one_sign() -> None:
    weight = np.zeros((8, 3), np.float32)
    weight[:, 1], weight[:, 2] = 1, -1
    found, zero, codes = gptq_ranged(weight, correlated(8), 4)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(codes * found, weight, atol=1e-6)
    np.testing.assert_array_equal(zero[1:], [0, 15])


def test_few_rows_are_shrunk_to_the_diagonal() -> None:
    moments = correlated(8)
    np.testing.assert_allclose(shrunk(moments, 10**9), moments, rtol=1e-6)
    half = shrunk(moments, 8)
    np.testing.assert_allclose(np.diag(half), np.diag(moments))
    np.testing.assert_allclose(half[0, 1], moments[0, 1] / 2)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_value_of_a_code_has_that_code(bits: int) -> None:
    """scale·code is quantized to the code, exactly, in float32 and for every scale."""
    low, high = limits(bits)
    random = np.random.default_rng(bits)
    scale = np.asarray(2.0 ** random.uniform(-60, 20, 5000), np.float32)
    codes = np.broadcast_to(np.arange(low, high + 1, dtype=np.int32)[:, None], (1 << bits, 5000))
    spec = TensorSpec("w", Rule(bits), scale, np.zeros(5000, np.int32), axis=1)
    np.testing.assert_array_equal(quantize(dequantize(codes, spec), spec), codes)


# --- in a model -----------------------------------------------------------------------------

IMAGES = sample(64, 6, 8, seed=3)


def quantized(rounding: str, choices: Choices | None = None, **options: Any) -> SiteQuantizer:
    model = transformer(choices or Choices(packed=False), blocks=2)
    blocks = find_blocks(model)
    config = QuantizeConfig(quantizer="deploy", rounding=rounding, threads=1, **options)
    plan = Plan(model, blocks, find_sites(model, blocks), config)
    batches = [IMAGES[i : i + 16] for i in range(0, len(IMAGES), 16)]
    if config.equalizes:
        plan = equalise(plan, batches)
    quantizer = make_quantizer(plan)
    quantizer.run(torch.zeros(1, 6, 8), batches)
    return quantizer


def noise(quantizer: SiteQuantizer, images: np.ndarray) -> float:
    """Mean squared error of the outputs."""
    lowered = to_standard(lower(quantizer.model, quantizer.specs))
    expected = run(to_standard(quantizer.plan.model), images)[0]
    return float(np.mean((run(lowered, images)[0] - expected) ** 2))


@pytest.mark.parametrize(("rounding", "part"), [("gptq", 0.7), ("adaround", 0.95)])
@pytest.mark.parametrize("equalize", [True, False])
def test_a_transformer_loses_less(rounding: str, part: float, equalize: bool) -> None:
    """At 4 bits, where weights decide. What is minimised is each linear's error, not this."""
    options: dict[str, Any] = {"bits": "4/8/8", "equalize": equalize}
    before = noise(quantized("nearest", **options), IMAGES)
    after = noise(quantized(rounding, **options), IMAGES)
    assert after < part * before


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_scales_stay_and_weights_are_on_the_grid(rounding: str) -> None:
    quantizer, plain = quantized(rounding), quantized("nearest")
    moved = 0
    for node, before in zip(quantizer.model.graph, quantizer.plan.model.graph, strict=True):
        if not is_linear(node):
            continue
        name = str(node.inputs[1].name)
        spec = quantizer.specs[name]
        np.testing.assert_array_equal(spec.scale, plain.specs[name].scale)
        value, exact = constant(node.inputs[1]), constant(before.inputs[1])
        np.testing.assert_array_equal(dequantize(quantize(value, spec), spec), value)
        assert np.abs(value - exact).max() <= 4 * spec.scale.max()
        moved += int(np.sum(quantize(value, spec) != quantize(exact, spec)))
        variables = {quantizer.tensor_of(v): v for v in quantizer.graph.variables.values()}
        np.testing.assert_array_equal(variables[name].value.numpy(), value)
    assert moved > 20


def test_the_bias_makes_up_for_the_rounding() -> None:
    """The mean of every linear's output stays, measured against the weight before rounding, rows
    counting as their positions do."""
    quantizer = quantized("gptq", bits="3/8/8", equalize=False)
    importance = importance_of_inputs(quantizer.plan.model, [IMAGES], len(IMAGES))
    floats = quantizer.plan.model.clone()
    linears = [node for node in floats.graph if is_linear(node)]
    floats.graph.outputs.extend(dict.fromkeys(node.inputs[0] for node in linears))
    names = [str(value.name) for value in floats.graph.outputs]
    inputs = dict(zip(names, run(to_standard(floats), IMAGES), strict=True))
    after = {node.name: node for node in quantizer.model.graph}
    for node in linears:
        read = str(node.inputs[0].name)
        counts = importance.rows(read, inputs[read].shape[:-1])
        x = inputs[read].astype(np.float64).reshape(len(counts), -1)
        error = x @ constant(after[node.name].inputs[1]) + constant(after[node.name].inputs[2])
        error -= x @ constant(node.inputs[1]) + constant(node.inputs[2])
        np.testing.assert_allclose(np.average(error, axis=0, weights=counts), 0, atol=1e-5)
        assert np.abs(error).max() > 1e-3


def test_shared_weights_stay_at_the_nearest() -> None:
    model = transformer(Choices(packed=False), blocks=1)
    linears = [n for n in model.graph if is_linear(n)]
    shared = linears[0].inputs[1]
    linears[1].replace_input_with(1, shared)
    blocks = find_blocks(model)
    config = QuantizeConfig(quantizer="deploy", rounding="gptq", threads=1, equalize=False)
    quantizer = make_quantizer(Plan(model, blocks, find_sites(model, blocks), config))
    quantizer.run(torch.zeros(1, 6, 8), [IMAGES])
    after = {n.name: n for n in quantizer.model.graph}
    assert np.array_equal(constant(after[linears[0].name].inputs[1]), constant(shared))
    other, was = after[linears[2].name].inputs[1], linears[2].inputs[1]
    assert not np.array_equal(constant(other), constant(was))


def test_too_many_channels_stay_at_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq_onnx.quantizers.rounded_weights.WIDEST", 8)
    quantizer = quantized("gptq")
    assert any("its 32 inputs are too many" in note for note in quantizer.notes)


def test_scales_of_another_run_are_refused() -> None:
    quantizer = quantized("gptq")
    with pytest.raises(ConfigError, match="--rounding gptq needs the images"):
        quantizer.reuse(quantizer.specs, "report.json")
