"""``--quantize-residual``: the skip input of residual adds in int8, their branch as it was."""

from __future__ import annotations

from pathlib import Path

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
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.by_name import make_quantizer
from ptq_onnx.targets.checking.check import check


def test_every_residual_add_reads_one_dequantized_skip(tmp_path: Path) -> None:
    model, x = transformer(Choices(), blocks=2), tokens(16, seed=1)
    model.graph.opset_imports[""] = 20
    config = QuantizeConfig(target="tensorrt", quantize_residual=True, threads=1)
    blocks, batches = find_blocks(model), [tokens(8), tokens(8, seed=2)]
    plan = equalise(Plan(model, blocks, find_sites(model, blocks), config), batches)
    quantizer = make_quantizer(plan)
    quantizer.run(torch.from_numpy(batches[0][:1]), batches)
    lowered = lower(quantizer.model, quantizer.specs)
    names = {n for n, role in plan.blocks.roles.items() if role.name in ("residual1", "residual2")}
    adds = [n for n in lowered.graph if n.name in names]
    assert len(adds) == 4
    for add in adds:
        makers = [None if v.producer() is None else v.producer().op_type for v in add.inputs]
        assert makers.count("DequantizeLinear") == 1, makers
        pair = next(v.producer() for v in add.inputs if v.producer().op_type == "DequantizeLinear")
        scale, zero = (v.const_value.numpy() for v in pair.inputs[1:])
        assert scale.ndim == 0
        assert zero == np.int8(0)
    path = tmp_path / "quantized.onnx"
    graphs.save(lowered, path)
    found = check(path, "tensorrt").violations
    assert {v.rule for v in found} == {"attention-head-size"}  # 4 channels a head
    found = run(path, x)
    simulated = next(iter(Simulator(quantizer.model, quantizer, threads=1).run(x).values()))
    assert decibels(found, simulated) >= 100
    assert decibels(run(model, x), found) >= 20


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "integer"])
def test_other_targets_refuse_it(target: str) -> None:
    with pytest.raises(ConfigError, match="use --target tensorrt"):
        QuantizeConfig(target=target, quantize_residual=True)
