"""``ptq-onnx inspect``: what it tells of a known model, and the reasons of near misses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from small_graph import SmallGraph, sample

from ptq_onnx.cli import inspect as cli_inspect
from ptq_onnx.preparation.inspection import OUTSIDE, Inspection, inspect

ROOT = Path(__file__).resolve().parents[2]


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


def test_what_cannot_be_prepared_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inputs, outputs and ops as the file has them, and why it cannot be quantized."""
    g = SmallGraph(())
    g.inputs[0].type.tensor_type.elem_type = 7
    table = g.const(sample(100, 8), "table")
    path = g.save(tmp_path / "text.onnx", g("Tanh", g("Tanh", g("Gather", table, "x"))))
    found = inspect(path)
    assert found.refused is not None
    assert "'x' (int64 []), which is no tensor [batch, …] of numbers" in found.refused
    assert found.ops == {"Tanh": 2, "Gather": 1}
    assert (found.inputs[0].dtype, found.inputs[0].shape) == ("int64", ())
    assert (found.parameters, found.nodes, found.blocks) == (800, 3, 0)
    cli_inspect.show(found)
    text = " ".join(capsys.readouterr().out.split())
    assert f"not prepared: {found.refused}" in text
    assert "3: 2 Tanh, 1 Gather" in text
    json.dumps(asdict(found))


def test_the_ops_of_a_file(digits: Inspection) -> None:
    assert digits.refused is None
    assert sum(digits.ops.values()) == digits.nodes_before


def test_an_input_in_bytes_is_told_as_the_file_has_it(tmp_path: Path) -> None:
    g = SmallGraph(("n", 8, 8, 3))
    g.inputs[0].type.tensor_type.elem_type = 2
    path = g.save(tmp_path / "m.onnx", g("ReduceMean", g("Cast", "x", to=1), keepdims=0))
    found = inspect(path).inputs[0]
    assert (found.name, found.dtype, found.shape) == ("x", "uint8", ("n", 8, 8, 3))


def test_nothing_of_torch_is_imported_to_look_at_a_model() -> None:
    """That takes longer than looking. The module of ONNX Runtime is the one that others get."""
    code = (
        "import sys\n"
        "from ptq_onnx.preparation import inspection, symbolic_inference as ours\n"
        f"inspection.inspect({str(ROOT / 'models/digits_vit.onnx')!r})\n"
        "print('torch' in sys.modules)\n"
        "from onnxruntime.tools import symbolic_shape_infer as theirs\n"
        "print(ours._module() is theirs)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
