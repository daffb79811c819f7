"""A·V with V less its mean: equal in float, and less lost where A is rounded coarsely."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_transformer import Choices, transformer
from test_targets import decibels, quantized, run, tokens

from ptq_onnx.calibration.mean_centred import SUFFIX, collect_centred, takes_centring
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.engine.torch_ops import HANDLERS
from ptq_onnx.errors import ConfigError
from ptq_onnx.numerics.around.token_mean import TokenMean
from ptq_onnx.numerics.fake_quantize import fake_quantize
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.preparation.model_files import save
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import SiteQuantizer
from ptq_onnx.targets.checking.check import check


def value_specs(quantizer: SiteQuantizer) -> dict[str, TensorSpec]:
    return {t: s for t, s in quantizer.specs.items() if quantizer.plan.sites[t].role == "v"}


def test_fine_codes_give_the_float_model_back() -> None:
    """Only v, with a step so fine that nothing but the reformulation is left."""
    quantizer = quantized(transformer(Choices(), blocks=2), "tensorrt", [tokens(8)], centred=True)
    specs = value_specs(quantizer)
    assert len(specs) == 2
    assert all((TokenMean() in spec.rule.around) for spec in specs.values())
    model, x = quantizer.plan.model, tokens(8, seed=3)
    lowered = lower(model, specs)
    kinds = [n.op_type for n in lowered.graph]
    assert kinds.count("ReduceSum") == kinds.count("Sub") == 2
    assert decibels(run(model, x), run(lowered, x)) >= 35
    lossless = [n for n in lowered.graph if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in reversed(lossless):
        if node.op_type == "DequantizeLinear" and node.inputs[0].producer() is not None:
            before = node.inputs[0].producer().inputs[0]
            node.outputs[0].replace_all_uses_with(before)
    np.testing.assert_allclose(run(lowered, x), run(model, x), rtol=1e-4, atol=1e-5)


def test_a_coarse_map_loses_less() -> None:
    """Float64: rows whose small weights round to zero, values with a common part."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4, 64, 64))
    maps = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    values = generator.normal(size=(4, 64, 16)) + 3 * generator.normal(size=(4, 1, 16))
    rounded = np.round(maps * 127) / 127
    exact, mean = maps @ values, values.mean(-2, keepdims=True)
    plain, centred = rounded @ values, rounded @ (values - mean) + mean
    assert decibels(exact, centred) >= decibels(exact, plain) + 10


def test_statistics_are_those_of_what_is_quantized() -> None:
    model = transformer(Choices())
    batches = [tokens(8), tokens(8, seed=2)]
    quantizer = quantized(transformer(Choices()), "tensorrt", batches, centred=True)
    (spec,) = value_specs(quantizer).values()
    site = quantizer.plan.sites[spec.tensor]
    plan_model = quantizer.plan.model
    stats = collect_centred(plan_model, [site], [site], batches)
    probe = plan_model.clone()
    probe.graph.outputs[:] = [
        next(v for n in probe.graph for v in n.outputs if v.name == spec.tensor)
    ]
    value = np.concatenate([run(probe, b) for b in batches])
    left = value - value.mean(-2, keepdims=True)
    assert stats.channels[spec.tensor + SUFFIX].highest[0].max() == pytest.approx(left.max(), 1e-5)
    assert stats.channels[spec.tensor].highest[0].max() == pytest.approx(value.max(), 1e-5)
    assert float(spec.scale) * 128 >= np.abs(left).max() * 0.999
    assert not {"ReduceMean", "ReduceSum"} & {n.op_type for n in model.graph}


def test_a_value_that_others_read_keeps_its_mean() -> None:
    model = transformer(Choices())
    by_name = {v.name: v for n in model.graph for v in n.outputs}
    quantizer = quantized(transformer(Choices()), "tensorrt", [tokens(8)], centred=True)
    (spec,) = value_specs(quantizer).values()
    value = by_name[spec.tensor]
    assert takes_centring(value)
    model.graph.outputs.append(value)
    assert not takes_centring(value)
    attention = next(n for n in model.graph if n.op_type == "Softmax").outputs[0]
    assert not takes_centring(attention)


def test_the_mean_stays_unless_asked_for() -> None:
    for target in ("onnxruntime", "openvino", "tensorrt"):
        quantizer = quantized(transformer(Choices()), target, [tokens(8)])
        assert not any((TokenMean() in s.rule.around) for s in quantizer.specs.values())


def test_only_tensorrt_takes_it() -> None:
    for target in ("onnxruntime", "openvino", "integer"):
        with pytest.raises(ConfigError, match=f"--centre-values with --target {target}: .*use"):
            QuantizeConfig(target=target, centre_values=True)


def test_the_checker_names_the_add(tmp_path: Path) -> None:
    """Without centring, QuantizeLinear stands right behind A·V, but for layout ops."""
    for centred in (False, True):
        quantizer = quantized(transformer(Choices()), "tensorrt", [tokens(8)], centred=centred)
        path = tmp_path / f"{centred}.onnx"
        save(lower(quantizer.model, quantizer.specs), path)
        rules = [v.rule for v in check(path, "tensorrt").violations]
        assert ("attention-output" in rules) == centred


def test_the_mean_is_given_back() -> None:
    quantizer = quantized(transformer(Choices()), "tensorrt", [tokens(8)], centred=True)
    (spec,) = value_specs(quantizer).values()
    x = np.random.default_rng(1).normal(size=(2, 2, 6, 4)).astype(np.float32) + 2
    held = fake_quantize(x, spec)
    np.testing.assert_allclose(held.mean(-2), x.mean(-2), atol=float(spec.scale))
    maps = torch.full((2, 2, 6, 6), 0.1)
    product = HANDLERS["MatMul"]({"centred": 1}, [maps, torch.from_numpy(x)]).numpy()
    mean = x.mean(-2, keepdims=True)
    np.testing.assert_allclose(product, np.broadcast_to(mean, x.shape), rtol=1e-5, atol=1e-5)
    again = TensorSpec.from_json(spec.tensor, spec.to_json())
    assert again.rule == spec.rule
    assert again.rule != replace(spec.rule, around=())


def test_the_torch_mode_follows() -> None:
    model = transformer(Choices(), blocks=2)
    model.graph.opset_imports[""] = 20
    quantizer = quantized(model, "tensorrt", [tokens(8)], centred=True)
    x = tokens(8, seed=3)
    exact = next(iter(Simulator(quantizer.model, quantizer, threads=1).run(x).values()))
    torch_mode = Simulator(quantizer.model, quantizer, mode="torch", threads=1)
    assert decibels(exact, next(iter(torch_mode.run(x).values()))) >= 25
