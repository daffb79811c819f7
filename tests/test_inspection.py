"""``ptq-onnx inspect``: what it tells of a known model, and the reasons of near misses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from small_graph import SmallGraph, sample

from ptq_onnx import cli_inspect
from ptq_onnx.inspection import OUTSIDE, Inspection, inspect

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def digits() -> Inspection:
    return inspect(ROOT / "models/digits_vit.onnx")


def test_a_known_model(digits: Inspection) -> None:
    assert digits.blocks == 6
    assert digits.roles["0"] == digits.roles["5"]
    assert digits.roles["0"]["qkv"] == digits.roles[OUTSIDE]["head"] == 1
    assert (digits.unrecognised, digits.near_misses) == ((), ())
    assert digits.inputs[0].shape[0] == "batch"
    assert digits.bytes == (ROOT / "models/digits_vit.onnx").stat().st_size
    assert digits.fusions["Linear"] >= 25
    assert digits.nodes < digits.nodes_before
    json.dumps(asdict(digits))


def test_the_table_joins_blocks_that_are_alike(
    digits: Inspection, capsys: pytest.CaptureFixture[str]
) -> None:
    cli_inspect.show(digits)
    text = capsys.readouterr().out
    assert "0 to 5" in text
    assert "outside" in text


def test_near_misses_have_reasons(tmp_path: Path) -> None:
    """A norm whose ε is a tensor, a GELU with a wrong root, a softmax without values."""
    g = SmallGraph(("batch", 3, 5, 8))
    centred = g("Sub", "x", g("ReduceMean", "x", np.array([-1]), keepdims=1))
    variance = g("ReduceMean", g("Mul", centred, centred), np.array([-1]), keepdims=1)
    norm = g("Div", centred, g("Sqrt", g("Add", variance, np.linspace(0.1, 0.2, 8))))
    plus = g("Add", g("Erf", g("Div", norm, 1.5)), 1.0)
    gelu = g("Mul", g("Mul", norm, 0.5), plus)
    out = g("Softmax", g("MatMul", gelu, sample(8, 8)), axis=-1)
    found = inspect(g.save(tmp_path / "near.onnx", out))
    reasons = {miss.op_type: (miss.family, miss.reason) for miss in found.near_misses}
    assert reasons["Sqrt"] == ("LayerNormalization", "Epsilon must be one small constant.")
    assert reasons["Erf"][0] == "Gelu"
    assert "Gelu's constants" in reasons["Erf"][1]
    assert reasons["Softmax"][0] == "attention"
    assert found.blocks == 0
    assert {u.op_type for u in found.unrecognised} >= {"Erf", "Sqrt", "Softmax"}
