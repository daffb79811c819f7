"""``quantize`` with the target integer: its file, and what its report says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from prepared_models import DIGITS, ROOT

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.targets.integer.rules import violations

TOKENS, WIDTH, HEADS, BLOCKS = 65, 64, 4, 6


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("integer") / "out"
    config = QuantizeConfig(
        target="integer", images=16, analysis_images=2, pictures=False, threads=1
    )
    quantize(DIGITS, config=config, output=folder, calib=ROOT / "img/digits/calib")
    return folder


@pytest.fixture(scope="module")
def report(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return found


def test_the_file_is_integer(output: Path, report: dict[str, Any]) -> None:
    assert violations(ir.load(output / "quantized.onnx")) == []
    assert report["arithmetic"] == "integer"
    assert not any("float" in note for note in report["notes"])
    assert not any("float here" in entry["reason"] for entry in report["floats"])
    assert "every op between" in (output / "report.html").read_text(encoding="utf-8")


def test_every_tensor_has_its_range_and_stays_in_it(report: dict[str, Any]) -> None:
    columns, rows = report["integer"]["ranges"]["columns"], report["integer"]["ranges"]["rows"]
    assert len(rows) > 1400
    for row in rows:
        entry = dict(zip(columns, row, strict=True))
        assert entry["low"] <= entry["seen_low"] <= entry["seen_high"] <= entry["high"]
        assert entry["bits"] <= 64
    widest = report["integer"]["widest"]
    assert widest["accumulator"]["bits"] <= 24
    assert widest["int64"]["bits"] <= 63


def test_operations_are_those_of_the_architecture(report: dict[str, Any]) -> None:
    """MACs of the linears and products, counted by hand."""
    linears = BLOCKS * TOKENS * WIDTH * WIDTH * (3 + 1 + 4 + 4) + 10 * WIDTH
    attention = BLOCKS * TOKENS * TOKENS * WIDTH
    patches = (TOKENS - 1) * WIDTH * _patch_weights()
    found = report["integer"]["operations"]
    assert found["power_of_two_macs"] == 0
    assert found["macs"] == linears + 2 * attention + patches
    assert found["look_ups"] == BLOCKS * TOKENS * 4 * WIDTH
    assert found["divisions"] < found["shifts"]


def _patch_weights() -> int:
    conv = next(n for n in ir.load(DIGITS).graph if n.op_type == "Conv")
    weight = conv.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    return int(np.prod(weight.const_value.numpy().shape[1:]))


def test_traffic_is_below_that_of_the_float_model(report: dict[str, Any]) -> None:
    traffic = report["integer"]["traffic"]
    assert traffic["ratio"] > 2.5
    assert traffic["float_weights"] > 3 * traffic["integer_weights"]
