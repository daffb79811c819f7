"""FP8 E4M3 bit for bit, and a file in it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from small_transformer import Choices, transformer
from test_targets import decibels, run, tokens

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.equalization.equalize import equalise
from ptq_onnx.errors import ConfigError
from ptq_onnx.evaluation.network import session
from ptq_onnx.numerics.codes.e4m3 import E4m3, e4m3_codes, e4m3_values
from ptq_onnx.numerics.fake_quantize import fake_quantize, quantize
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.by_name import make_quantizer
from ptq_onnx.targets.checking.check import check

KIND = ml_dtypes.float8_e4m3fn
VALUES = np.arange(256, dtype=np.uint8).view(KIND).astype(np.float32)
FINITE = np.sort(VALUES[np.isfinite(VALUES)])


def test_all_values() -> None:
    np.testing.assert_array_equal(e4m3_values(np.arange(256)), VALUES)


def test_all_codes_ties_neighbours_and_saturation() -> None:
    ties = (FINITE[1:] + FINITE[:-1]) / 2
    above, below = np.nextafter(ties, np.float32(1e9)), np.nextafter(ties, np.float32(-1e9))
    beyond = np.float32([449, 463, 464, 465, 1e9, 3e38, 2**-10, 2**-11, 1e-30])
    random = np.random.default_rng(0).normal(size=20000) * 10.0 ** np.arange(-5, 5).repeat(2000)
    x = np.concatenate([FINITE, ties, above, below, beyond, -beyond, random]).astype(np.float32)
    expected = np.clip(x, -448, 448).astype(KIND).view(np.uint8)
    np.testing.assert_array_equal(e4m3_codes(x), expected)
    spec = TensorSpec("x", Rule(code=E4m3()), np.array(1, np.float32), np.array(0, np.int32))
    np.testing.assert_array_equal(quantize(x, spec), expected)
    np.testing.assert_array_equal(fake_quantize(x, spec), e4m3_values(expected))


def test_a_small_file(tmp_path: Path) -> None:
    model, batches, x = transformer(Choices(), blocks=2), [tokens(8)], tokens(16, seed=1)
    model.graph.opset_imports[""] = 20
    config = QuantizeConfig(target="tensorrt", precision="fp8", threads=1)
    blocks = find_blocks(model)
    plan = equalise(Plan(model, blocks, find_sites(model, blocks), config), batches)
    quantizer = make_quantizer(plan)
    quantizer.run(torch.from_numpy(batches[0][:1]), batches)
    assert {s.rule.code for s in quantizer.specs.values()} == {E4m3()}
    for tensor, spec in quantizer.specs.items():
        if plan.sites[tensor].role == "softmax":
            assert float(spec.scale) == pytest.approx(1 / 448)
    path = tmp_path / "quantized.onnx"
    graphs.save(lower(quantizer.model, quantizer.specs), path)
    report = check(path, "tensorrt")
    assert {v.rule for v in report.violations} == {"attention-head-size"}  # 4 channels a head
    assert report.quantized_products == report.products == 4
    opened = session(path, 1, cpu=True)
    found = opened.run(None, {opened.get_inputs()[0].name: x})[0]
    assert decibels(run(model, x), found) >= 25
    simulated = next(iter(Simulator(quantizer.model, quantizer, threads=1).run(x).values()))
    assert decibels(found, simulated) >= 30  # products of floats: their order moves single codes


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target": "onnxruntime", "quantizer": "deploy"}, "no FP8 products"),
        ({"target": "openvino"}, "no FP8 products"),
        ({"target": "tensorrt", "bits": "4/8/8"}, "FP8 has 8 bits"),
        ({"target": "tensorrt", "rounding": "gptq"}, "rounds to integers"),
        ({"target": "tensorrt", "method": "mse"}, "integer grid"),
        ({"target": "tensorrt", "per_channel": ("fc2",)}, "one scale"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        QuantizeConfig(precision="fp8", **options)
    assert "\n" not in str(caught.value)
