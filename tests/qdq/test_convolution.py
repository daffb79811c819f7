"""Convolutions under fqvit: factors in their weights, codes on both sides, the same numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from small_graph import SmallGraph, run, sample

from ptq_onnx.blocks.channels import rows_in_weight
from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization.patch_forms import packed_pixels_as_linear
from ptq_onnx.equalization.restructure import in_form
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.numerics.ptf import Reader, output_noise
from ptq_onnx.preparation.model_files import serialize
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer
from ptq_onnx.targets.checking.check import check
from ptq_onnx.targets.checking.optimised import optimised_histogram

C, SIDE = 8, 6
LEVELS = np.exp2(np.arange(C) % 4).reshape(C, 1, 1)
BATCHES = [sample(2, C, SIDE, SIDE, seed=s) for s in range(3)]


def network(groups: int, cut: bool = False) -> ir.Model:
    """Channels of very different ranges → Conv → Relu → Conv, and the first tensor added."""
    g = SmallGraph(("batch", C, SIDE, SIDE))
    x = g("Relu", g("Mul", "x", LEVELS))
    read = x
    if cut:  # channels last where LayerNorm stands, both readers behind one Transpose
        x = g("Transpose", x, perm=[0, 2, 3, 1])
        x = g("LayerNormalization", x, LEVELS.ravel() * 2, np.zeros(C), axis=-1)
        x = read = g("Transpose", x, perm=[0, 3, 1, 2])
    first = sample(C, C // groups, 3, 3, seed=3) * 0.3
    y = g("Conv", read, first, sample(C, seed=4), pads=[1, 1, 1, 1], group=groups)
    y = g("Conv", g("Relu", y), sample(C, C, 1, 1, seed=5) * LEVELS[:, None], sample(C, seed=6))
    model = g.model(g("Add", x, y))
    fuse(model)
    return model


def quantized(model: ir.Model) -> SiteQuantizer:
    blocks = find_blocks(model)
    config = QuantizeConfig(quantizer="fqvit", threads=1)
    made = make_quantizer(in_form(Plan(model, blocks, find_sites(model, blocks), config)))
    made.run(torch.from_numpy(BATCHES[0]), BATCHES)
    return made


@pytest.mark.parametrize("groups", [1, C])
@pytest.mark.parametrize("cut", [False, True])
def test_convolutions_run_on_codes(groups: int, cut: bool) -> None:
    model = network(groups, cut)
    made = quantized(model)
    factors = [s.factor for s in made.specs.values() if s.factor is not None]
    assert sum(float(f.max() / f.min()) >= 4 for f in factors) >= 2
    file = lower(made.model, made.specs)
    assert check(file, "onnxruntime").errors == ()
    found = optimised_histogram(serialize(file))
    assert found["QLinearConv"] == 2
    assert "Conv" not in found
    assert "FusedConv" not in found
    expected = run(model, BATCHES[0])[0]
    noise = ((run(file, BATCHES[0])[0] - expected).astype(np.float64) ** 2).sum()
    assert 10 * np.log10((expected.astype(np.float64) ** 2).sum() / noise) > 20


@pytest.mark.parametrize("groups", [1, 2, 4, C])
def test_a_factor_per_input_channel_divides_the_weight(groups: int) -> None:
    """Conv(x, W) is Conv(x / f, W · f) for f in the weight's shape."""
    weight = sample(C, C // groups, 3, 3, seed=3)
    g = SmallGraph(("batch", C, SIDE, SIDE))
    model = g.model(g("Conv", "x", weight, group=groups))
    factor = np.exp2(np.arange(C)).astype(np.float32)
    spread = rows_in_weight(next(iter(model.graph)), factor)
    g = SmallGraph(("batch", C, SIDE, SIDE))
    moved = g.model(
        g("Conv", g("Div", "x", factor.reshape(C, 1, 1)), weight * spread, group=groups)
    )
    np.testing.assert_allclose(run(moved, BATCHES[0])[0], run(model, BATCHES[0])[0], atol=1e-5)


def test_the_noise_of_one_pixel_is_that_of_a_linear() -> None:
    weight, moment = sample(12, C, 1, 1, seed=1), np.linspace(1, 2, C)
    step, alpha = np.linspace(0.1, 1, C), np.arange(C, dtype=np.int32) % 3
    one = Reader.of_convolution(weight, 1, moment)
    other = Reader.of(weight[:, :, 0, 0].T, moment)
    noise = output_noise(step, alpha, other)
    assert output_noise(step, alpha, one) == pytest.approx(noise, rel=1e-6)
    both = output_noise(step, alpha, one.beside(other))
    assert both == pytest.approx(2 * noise, rel=1e-6)
    passed = output_noise(step, alpha, other.passed_on())
    assert passed == pytest.approx(noise + float(np.sum(step**2)) / 12, rel=1e-6)


def packed(kernel: int = 1, groups: int = 1, stride: int = 1) -> ir.Model:
    """A convolution whose output is cut into q, k and v."""
    g = SmallGraph(("batch", C, 4, 4))
    weight = sample(3 * C, C // groups, kernel, kernel, seed=1)
    edge = kernel // 2
    y = g(
        "Conv", "x", weight, sample(3 * C, seed=2), group=groups, pads=[edge] * 4,
        strides=[stride] * 2,
    )  # fmt: skip
    flat = g("Reshape", y, np.array([0, 3 * C, 16 // stride**2]))
    first = g("Split", flat, np.array([C] * 3), axis=1, outputs=3)
    q, k, v = first, f"{first}_1", f"{first}_2"
    logits = g("MatMul", g("Transpose", q, perm=[0, 2, 1]), k)
    return g.model(g("MatMul", g("Softmax", logits, axis=-1), g("Transpose", v, perm=[0, 2, 1])))


def test_packed_pixels_become_a_linear() -> None:
    model = packed()
    x = sample(2, C, 4, 4)
    expected = run(model, x)[0]
    assert packed_pixels_as_linear(model) == 1
    assert packed_pixels_as_linear(model) == 0
    np.testing.assert_allclose(run(model, x)[0], expected, rtol=1e-4, atol=1e-5)
    assert "Conv" not in [n.op_type for n in model.graph]


@pytest.mark.parametrize("other", [{"kernel": 3}, {"groups": 2}, {"stride": 2}])
def test_other_convolutions_stay(other: dict[str, int]) -> None:
    assert packed_pixels_as_linear(packed(**other)) == 0
