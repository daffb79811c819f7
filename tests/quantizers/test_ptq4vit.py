"""PTQ4ViT: what it quantizes, that its file is what was simulated, and what twin codes gain."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from prepared_models import decibels, images, quantized
from test_targets import run

from ptq_onnx.analysis.coverage import measure_coverage
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.errors import ConfigError, ModelError
from ptq_onnx.numerics.codes.twin import Twin
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.fake_quantize import fake_quantize
from ptq_onnx.numerics.grain import PerChannel, PerTensor
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import SiteQuantizer
from ptq_onnx.quantizers.solved_specs import tensor_spec
from ptq_onnx.targets.checking.check import check
from ptq_onnx.targets.integer.nodes import make_plan


@cache
def made(bits: str = "8/8/8") -> SiteQuantizer:
    return quantized(quantizer="ptq4vit", bits=bits)


def by_role(role: str, bits: str = "8/8/8") -> list[TensorSpec]:
    quantizer = made(bits)
    return [quantizer.specs[s.tensor] for s in quantizer.plan.sites.values() if s.role == role]


def test_what_products_read_and_nothing_else() -> None:
    quantizer = made()
    sites = quantizer.plan.sites
    for tensor, rule in quantizer.rules.items():
        kinds = {quantizer.nodes[name].op_type for name in sites[tensor].consumers}
        assert kinds <= {"Linear", "MatMul", "Conv"}
        assert rule.grain == (PerChannel() if sites[tensor].is_parameter else PerTensor())
        twin = sites[tensor].role in ("softmax", "gelu")
        assert rule.code == (Twin() if twin else Uniform())
    floats = {sites[t].role for t in quantizer.floats}
    assert {"residual1", "residual2", "proj", "fc2", "fc1", "qk"} <= floats
    read = {"norm1", "q", "k", "v", "softmax", "av", "norm2", "gelu", "fc1.weight", "head.weight"}
    assert read <= {sites[t].role for t in quantizer.rules}


def test_the_ranges_are_a_power_of_two_apart() -> None:
    for spec in by_role("softmax"):
        assert float(spec.scale) * 2.0 ** spec.details["ratio"] == 1 / 128
        assert spec.details["ratio"] == spec.to_json()["ratio"]
        assert not spec.rule.signed
    for spec in by_role("gelu"):
        low, high = spec.clip
        assert spec.rule.signed
        assert high == pytest.approx(-low * 2.0 ** spec.details["ratio"], rel=1e-6)
        assert -low >= 0.1


@pytest.mark.parametrize("bits", ["8/8/8", "6/6/6"])
def test_the_file_is_what_was_simulated(bits: str, tmp_path: Path) -> None:
    quantizer, x = made(bits), images()[:8]
    path = tmp_path / "quantized.onnx"
    graphs.save(graphs.to_standard(lower(quantizer.model, quantizer.specs)), path)
    found = run(path, x)
    exact = next(iter(Simulator(quantizer.model, quantizer, threads=1).run(x).values()))
    assert decibels(found, exact) >= 60
    violations = check(path, "onnxruntime").violations
    covered = measure_coverage(path, "onnxruntime")
    assert [(left.kind, left.count) for left in covered.left if "twin" in left.reason] == [
        ("linears", 6),
        ("attention products", 6),
    ]
    tables = [v for v in violations if v.rule == "table-codes"]
    assert len(tables) == len(by_role("softmax")) + len(by_role("gelu"))
    assert "twin codes: no int8 kernel" in tables[0].text
    # The convolution and the head, a matrix, run in float: as in the paper, outputs have no codes.
    others = {(v.rule, v.node) for v in violations if v not in tables}
    assert others == {
        ("conv-output", "/patch_embed/Conv"),
        ("products-in-integers", "/head/Gemm_matmul"),
    }


def test_twin_codes_keep_more_than_the_paper_s_uniform_ones() -> None:
    """At 6 bits, on images that calibration did not see: of attention maps than steps of 1/63, of
    what GELU makes than symmetric codes. (A zero point would serve GELU better than either.)"""
    x = images(count=48)[32:]
    quantizer = made("6/6/6")
    for role, least in (("softmax", 3.0), ("gelu", 1.0)):
        specs = by_role(role, "6/6/6")
        values = Simulator(quantizer.plan.model, threads=1).run(x, [s.tensor for s in specs])
        gains = []
        for spec in specs:
            value = values[spec.tensor]
            low, high = spec.clip
            site = quantizer.plan.sites[spec.tensor]
            symmetric = role == "gelu"
            rule = replace(spec.rule, code=Uniform(), signed=symmetric, symmetric=symmetric)
            uniform = tensor_spec(site, rule, low, high)
            gains.append(
                decibels(fake_quantize(value, spec), value)
                - decibels(fake_quantize(value, uniform), value)
            )
        assert np.mean(gains) >= least, (role, gains)


def test_a_report_gives_the_numbers_back() -> None:
    for spec in made().specs.values():
        again = TensorSpec.from_json(spec.tensor, spec.to_json())
        assert (again.rule, again.details, again.clip) == (spec.rule, spec.details, spec.clip)
        assert float(np.max(again.scale)) == float(np.max(spec.scale))


@pytest.mark.parametrize("target", ["tensorrt", "openvino", "integer"])
def test_other_targets_refuse_it_in_one_line(target: str) -> None:
    with pytest.raises(ConfigError, match=f"^--target {target}, quantizer ptq4vit: [^\n]+$"):
        QuantizeConfig(target=target, quantizer="ptq4vit")


def test_the_integer_plan_refuses_codes_that_it_has_no_steps_for() -> None:
    quantizer = quantized()
    gelu = next(s.tensor for s in quantizer.plan.sites.values() if s.role == "gelu")
    specs = {**quantizer.specs, gelu: by_role("gelu")[0]}
    with pytest.raises(ModelError, match="no grid for 'twin' codes") as raised:
        make_plan(quantizer.model, specs)
    assert "\n" not in str(raised.value)


def test_a_step_per_channel_is_refused_with_a_note() -> None:
    quantizer = quantized(quantizer="ptq4vit", per_channel=("fc2",))
    assert any("'twin' codes have no more" in note for note in quantizer.notes)
    gelu = [s.tensor for s in quantizer.plan.sites.values() if s.role == "gelu"]
    assert {quantizer.rules[t].grain for t in gelu} == {PerTensor()}
