"""Variation: each number against its formula on raw values; outliers are found and named."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from prepared_models import DIGITS, images, prepared, quantized

from ptq_onnx.analysis.advice import advise
from ptq_onnx.analysis.results import Error, Sensitivity, Switched
from ptq_onnx.analysis.tensor_sums import BINS, kurtosis, ratio_to_median, sdam
from ptq_onnx.analysis.variation import variation
from ptq_onnx.analysis.variation_results import Outlier, TensorVariation, Variation
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.numerics.fake_quantize import dequantize, quantize
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.quantizers.base import SiteQuantizer

COUNT = 6


@pytest.fixture(scope="module")
def quantizer() -> SiteQuantizer:
    return quantized(quantizer="vanilla")


@pytest.fixture(scope="module")
def found(quantizer: SiteQuantizer) -> Variation:
    p = prepared(DIGITS)
    batches = [images()[i : i + 2] for i in range(0, COUNT, 2)]
    return variation(p.model, p.blocks, p.sites, quantizer.specs, batches, threads=1)


def raw(tensor: str) -> NDArray[np.float64]:
    """The values of a tensor of the float model, all images at once."""
    copy = graphs.to_standard(prepared(DIGITS).model)
    value = next(v for n in copy.graph for v in n.outputs if v.name == tensor)
    if value not in copy.graph.outputs:
        copy.graph.outputs.append(value)
    session = ort.InferenceSession(graphs.serialize(copy), providers=["CPUExecutionProvider"])
    feed = session.get_inputs()[0].name
    (out,) = session.run([tensor], {feed: images()[:COUNT]})
    return np.asarray(out, np.float64)


def tensor_of(role: str, block: int | None) -> str:
    sites = prepared(DIGITS).sites.values()
    return next(s.tensor for s in sites if (s.role, s.block) == (role, block))


@pytest.mark.parametrize(("role", "block"), [("gelu", 2), ("residual1", 0), ("norm1", 4)])
def test_activation_numbers_are_those_of_the_raw_values(
    quantizer: SiteQuantizer, found: Variation, role: str, block: int
) -> None:
    tensor = tensor_of(role, block)
    x, spec = raw(tensor), quantizer.specs[tensor]
    (got,) = [t for t in found.tensors if t.tensor == tensor]
    assert (got.role, got.block, got.parameter) == (role, block, False)
    assert (got.low, got.high) == pytest.approx((x.min(), x.max()), rel=1e-4)
    assert got.absolute_mean == pytest.approx(np.abs(x).mean(), rel=1e-4)
    assert got.sdam == pytest.approx(np.abs(x).mean(axis=(0, 1)).std(), rel=1e-3)
    centred = x - x.mean()
    expected = (centred**4).mean() / (centred**2).mean() ** 2
    assert got.kurtosis == pytest.approx(expected, rel=1e-3)
    extremes = np.abs(x).max(axis=(0, 1))
    assert got.channel_ratio == pytest.approx(extremes.max() / np.median(extremes), rel=1e-4)
    rounded = dequantize(quantize(x.astype(np.float32), spec), spec)
    snr = -10 * np.log10(((rounded - x) ** 2).sum() / (x**2).sum())
    assert got.snr_db == pytest.approx(snr, abs=0.05)
    low, high = spec.clip
    half = float(spec.scale) / 2
    outside = (x < low - half) | (x > high + half)
    assert got.clipped == pytest.approx(outside.mean(), abs=2e-5)
    noise = ((rounded - x)[outside] ** 2).sum() / ((rounded - x) ** 2).sum()
    assert got.clip_noise == pytest.approx(noise, abs=0.01)
    counts = np.histogram(x, BINS, (got.low, got.high))[0]
    assert sum(got.histogram.float_counts) == sum(got.histogram.quantized_counts) == x.size
    assert np.abs(np.array(got.histogram.float_counts) - counts).sum() <= 0.001 * x.size


def test_heads_are_told_apart(found: Variation) -> None:
    tensor = tensor_of("v", 1)
    x = raw(tensor)
    (got,) = [t for t in found.tensors if t.tensor == tensor]
    assert got.sdam_heads == pytest.approx(np.abs(x).mean(axis=(0, 2, 3)).std(), rel=1e-3)
    (weight,) = [t for t in found.tensors if (t.role, t.block) == ("qkv.weight", 1)]
    value = prepared(DIGITS).model.graph.initializers[weight.tensor].const_value
    assert value is not None
    columns = np.abs(value.numpy()).mean(axis=0)
    heads = columns.reshape(3 * x.shape[1], -1).mean(axis=1)
    assert weight.sdam_heads == pytest.approx(heads.std(), rel=1e-4)
    assert weight.sdam == pytest.approx(columns.std(), rel=1e-4)


def test_every_site_and_every_norm_is_there(found: Variation) -> None:
    p = prepared(DIGITS)
    assert {t.tensor for t in found.tensors} == set(p.sites)
    assert found.images == COUNT
    norms = [n for n in p.model.graph if n.op_type == "LayerNormalization"]
    assert len(found.norm_inputs) == len(norms)
    one = found.norm_inputs[3]
    x = raw(one.tensor)
    np.testing.assert_allclose(one.low, x.min(axis=(0, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.high, x.max(axis=(0, 1)), rtol=1e-4, atol=1e-5)
    extremes = np.abs(x).max(axis=(0, 1))
    np.testing.assert_allclose(one.box, np.percentile(extremes, [0, 25, 50, 75, 100]), rtol=1e-4)
    kinds = {k.role: k for k in found.kinds}
    means = [t.absolute_mean for t in found.tensors if t.role == "fc2"]
    assert kinds["fc2"].sdam_modules == pytest.approx(np.std(means))
    assert kinds["fc2"].tensors == p.blocks.count


def test_formulas() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=200_000) * 3 + 1
    powers = np.array([(x**k).sum() for k in (1, 2, 3, 4)])
    assert kurtosis(x.size, powers) == pytest.approx(3, abs=0.05)
    assert kurtosis(4, np.array([8.0, 16, 32, 64])) == 3  # constant
    assert sdam(np.array([1.0])) is None
    assert sdam(np.array([1.0, 3.0])) == 1
    assert ratio_to_median(np.array([1, 2, 40], np.float32)) == 20
    assert ratio_to_median(np.zeros(3, np.float32)) is None


def test_outliers_are_found_where_they_are_put(found: Variation) -> None:
    channels = [o for o in found.outliers if o.kind == "channel"]
    assert channels
    for one in channels:
        x = np.abs(raw(one.tensor))
        extremes = x.max(axis=(0, 1))
        assert one.ratio == pytest.approx(extremes[one.channel] / np.median(extremes), rel=1e-3)
        assert abs(one.value) == pytest.approx(extremes[one.channel], rel=1e-4)
        image, token = np.unravel_index(x[..., one.channel].argmax(), x.shape[:2])
        assert one.token == token, image


@pytest.fixture(scope="module")
def loud(found: Variation) -> tuple[Variation, Sensitivity]:
    """Wide channels behind GELU, a massive token and a kind that costs much, as measured."""
    wide = {tensor_of("gelu", b): 40.0 + b for b in (2, 3)}
    tensors = tuple(
        replace(t, channel_ratio=wide.get(t.tensor, 2.0), clip_noise=0.0) for t in found.tensors
    )
    error = Error(0.1, 10.0, 0.1, 0.9, 1.0, 50.0)
    gains = tuple(
        Switched(
            name, "kind", name, None, "all", 6, 4, replace(error, snr_db=10 + gain), None, gain
        )
        for name, gain in (("fc2", 4.2), ("gelu", 0.3))
    )
    run = Sensitivity(4, 4, True, error, None, (), gains, 1.0)
    token = Outlier("token", tensor_of("residual2", 3), "residual2", 3, 41, 7, -560.0, 123.4)
    return replace(found, tensors=tensors, outliers=(token,)), run


def test_advice_names_blocks_ratio_and_options(
    quantizer: SiteQuantizer, loud: tuple[Variation, Sensitivity]
) -> None:
    p, (made, run) = prepared(DIGITS), loud
    texts = advise(quantizer.plan.config, p.sites, quantizer.specs, made, run, None)
    assert len(texts) == 3
    assert "10.0 dB with everything quantized): fc2 +4.2 dB (--keep-float)" in texts[0]
    assert texts[1].startswith("gelu (read by fc2) of blocks 2, 3: one channel 43× the median")
    assert "--per-channel fc2@2,3" in texts[1]
    assert "from block 3 on: up to -560 in blocks.3.residual2, token 7, channel 41" in texts[2]
    assert texts[2].endswith("(--method robust), or give the channel a scale of its own"
                             " (--quantizer fqvit).")  # fmt: skip
    others = quantized(quantizer="fqvit"), quantized(quantizer="deploy")
    for other in others:  # factors per channel and no clipping; in float
        config = other.plan.config
        assert len(advise(config, p.sites, other.specs, made, None, None)) == 0, other.name


@pytest.mark.parametrize(
    ("options", "fc2"),
    [
        ({"quantizer": "lowbit", "bits": "4/4/4"}, "8 bits (--more-bits fc2@2,3)"),
        ({"quantizer": "lowbit"}, "in float (--keep-float fc2@2,3)"),
        ({"target": "qnn"}, "16 bits (--more-bits fc2@2,3=16)"),
        ({"target": "integer"}, "16 bits (--more-bits fc2@2,3=16)"),
        ({"target": "openvino"}, "per channel (--per-channel fc2@2,3)"),
        ({"target": "tensorrt", "precision": "fp8"}, "in float (--keep-float fc2@2,3)"),
        ({"activations": "dynamic"}, "in float (--keep-float fc2@2,3)"),
        ({"quantizer": "fqvit"}, "per channel (--per-channel fc2@2,3)"),
    ],
    ids=str,
)
def test_advice_names_only_what_a_run_may_have(
    quantizer: SiteQuantizer,
    loud: tuple[Variation, Sensitivity],
    options: dict[str, str],
    fc2: str,
) -> None:
    config, (made, run) = QuantizeConfig(**options), loud
    bits = config.widths.activations
    specs = {t: replace(s, rule=replace(s.rule, bits=bits)) for t, s in quantizer.specs.items()}
    texts = advise(config, prepared(DIGITS).sites, specs, made, run, None)
    assert [t for t in texts if "fc2@2,3" in t] == [
        f"gelu (read by fc2) of blocks 2, 3: one channel 43× the median → {fc2}."
    ]
    named = re.findall(r"--([a-z-]+)(?: ([^ ),]+(?:,[0-9][^ )]*)?))?", " ".join(texts))
    assert named
    for option, value in named:
        name, one = option.replace("-", "_"), value or "fc2"
        several = name in ("per_channel", "keep_float", "more_bits")
        change = {name: (one,) if several else one}
        replace(config, **change)  # raises where they do not go together


def test_advice_on_clipping_and_weights(quantizer: SiteQuantizer, found: Variation) -> None:
    p = prepared(DIGITS)

    def changed(t: TensorVariation) -> TensorVariation:
        calm = replace(t, channel_ratio=1.0, clip_noise=0.0)
        if (t.role, t.block) == ("residual1", 4):
            return replace(
                calm, clip_noise=0.94, snr_db=6.3, low=-569.0, high=30.0, clipped=0.001,
                clip=(-12.0, 11.9),
            )  # fmt: skip
        if (t.role, t.block) == ("fc1.weight", 1):
            return replace(calm, channel_ratio=16.0)
        return calm

    made = replace(found, tensors=tuple(map(changed, found.tensors)), outliers=())
    texts = advise(quantizer.plan.config, p.sites, quantizer.specs, made, None, None)
    assert texts == (
        "residual1 of block 4: 94 % of the error is clipping (values -569…30, range -12…11.9,"
        " 0.1 % outside) → a wider range (--method robust or minmax).",
        "fc1.weight of block 1: one output channel 16× the median → weights per channel"
        " (--per-channel fc1.weight@1).",
    )
    lowbit = QuantizeConfig(quantizer="lowbit")  # takes neither: told all the same
    texts = advise(lowbit, p.sites, quantizer.specs, made, None, None)
    assert texts == (
        "residual1 of block 4: 94 % of the error is clipping (values -569…30, range -12…11.9,"
        " 0.1 % outside); no option of this run changes that.",
        "fc1.weight of block 1: one output channel 16× the median; no option of this run changes"
        " that.",
    )
