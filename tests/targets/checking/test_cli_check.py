"""``ptq-onnx check``: exit codes, the table, JSON, and what it refuses in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import quantized_block as q
from prepared_models import DIGITS, prepared, quantized

from ptq_onnx.cli import app as cli
from ptq_onnx.targets.checking.check import TARGETS
from ptq_onnx.targets.integer.lowering import lower_integer

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``ptq-onnx check``; returns exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ptq-onnx", "check", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        text = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, text.out, text.err

    return run


def saved(folder: Path, target: str, *edits: Callable[[q.Block], None]) -> Path:
    block = q.conforming(target)
    for edit in edits:
        edit(block)
    path = folder / "block.onnx"
    onnx.save(block.proto(), path)
    return path


@pytest.mark.parametrize("target", [t for t in TARGETS if t not in ("integer", "qnn")])
def test_conforming_file(command: Command, tmp_path: Path, target: str) -> None:
    code, out, err = command(saved(tmp_path, target), "--target", target)
    assert (code, err) == (0, "")
    assert f"block.onnx for {target}" in out
    assert "Violations" not in out
    assert "5 of 5" in out


def test_violations_are_listed(command: Command, tmp_path: Path) -> None:
    path = saved(tmp_path, "tensorrt", q.shifted)
    code, out, err = command(path, "--target", "tensorrt")
    assert (code, err) == (1, "")
    for word in ("zero-point-zero", "norm_q", "found 3", "Quantization is symmetric"):
        assert word in out


def test_warnings_alone_conform_unless_strict(command: Command, tmp_path: Path) -> None:
    path = saved(tmp_path, "onnxruntime", q.float_linear)
    assert command(path)[0] == 0
    assert command(path, "--strict")[0] == 1


def test_integer_file(command: Command, tmp_path: Path) -> None:
    """The histogram of ops, the widest accumulator against its type; a float op is an error."""
    model = lower_integer(prepared(DIGITS).model, quantized(target="integer").specs)
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    proto = ir.to_proto(model)
    onnx.save(proto, good)
    code, out, err = command(good, "--target", "integer")
    assert (code, err) == (0, "")
    table = " ".join(out.split())
    for text in ("MatMulInteger 37", "BitShift 144", "widest accumulator tensor", "bits 23, of 32"):
        assert text in table
    code, out, _ = command(good, "--target", "integer", "--json")
    found = json.loads(out)
    assert (code, found["conforms"], found["ops"]["MatMulInteger"]) == (0, True, 37)
    assert set(found["rules"]) == {"standard-domain", "no-float-inside", "no-overflow"}
    widest = found["facts"]["widest accumulator"]
    assert (widest["bits"], widest["of"]) == (23, 32)
    makers = {o: n.op_type for n in proto.graph.node for o in n.output}
    assert makers[widest["tensor"]] == "MatMulInteger"

    index, node = next((i, n) for i, n in enumerate(proto.graph.node) if n.op_type == "Transpose")
    code_name, node.input[0] = node.input[0], "back"
    for name, source, to in (("there", code_name, 1), ("back", "there", 2)):  # float32, uint8
        cast = onnx.helper.make_node("Cast", [source], [name], name=name, to=to)
        proto.graph.node.insert(index, cast)
        index += 1
    onnx.save(proto, bad)
    code, out, err = command(bad, "--target", "integer")
    assert (code, err) == (1, "")
    for word in ("no-float-inside", "there", "back", "FQ-ViT"):
        assert word in out
    found = json.loads(command(bad, "--target", "integer", "--json")[1])
    assert {v["node"] for v in found["violations"]} == {"there", "back"}


def test_json(command: Command, tmp_path: Path) -> None:
    path = saved(tmp_path, "onnxruntime", q.bare_conv)
    code, out, err = command(path, "--json")
    assert (code, err, out.count("\n")) == (1, "", 1)
    found: dict[str, Any] = json.loads(out)
    assert set(found) == {
        "model",
        "conforms",
        "target",
        "rules",
        "violations",
        "skipped",
        "ops",
        "linears",
        "quantized_linears",
        "products",
        "quantized_products",
        "facts",
    }
    assert (found["model"], found["target"], found["conforms"]) == (str(path), "onnxruntime", False)
    assert [sorted(v) for v in found["violations"]] == [["node", "rule", "severity", "text"]]
    assert found["violations"][0]["rule"] == "conv-output"
    assert found["violations"][0]["node"] == "conv"
    assert found["facts"]["optimised"]["MatMulIntegerToFloat"] == 6
    assert "products-in-integers" in found["rules"]


def assert_refused(outcome: tuple[int, str, str], *words: str) -> None:
    code, out, err = outcome
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_what_is_refused(command: Command, tmp_path: Path) -> None:
    assert_refused(command(tmp_path / "none.onnx"), "none.onnx")
    empty, cut, text = (tmp_path / f"{name}.onnx" for name in ("empty", "cut", "text"))
    whole = saved(tmp_path, "tensorrt")
    empty.write_bytes(b"")
    cut.write_bytes(whole.read_bytes()[:2000])
    text.write_text("not a model")
    assert_refused(command(empty), "0 bytes")
    assert_refused(command(cut), "cut.onnx")
    assert_refused(command(text), "text.onnx")
    assert_refused(command(whole, "--target", "coreml"), "'coreml'", "tensorrt, onnxruntime")


def test_float_model_of_several_inputs(command: Command, tmp_path: Path) -> None:
    """What cannot be quantized can be checked all the same."""
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 4]) for n in "abc"]
    node = helper.make_node("MatMul", ["a", "b"], ["c"], "product")
    graph = helper.make_graph([node], "two", values[:2], values[2:])
    path = tmp_path / "two.onnx"
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    code, out, _ = command(path, "--json")
    assert code == 0
    assert [v["rule"] for v in json.loads(out)["violations"]] == ["float-product"]
