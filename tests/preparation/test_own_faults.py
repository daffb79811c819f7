"""A fault of the package is told in one line, and blamed on the file where that does not run."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from fuzz.found.cases import SHORT
from fuzz.oracle import judge
from fuzz.seeds import vit

from ptq_onnx.errors import ModelError
from ptq_onnx.pipeline import quantize as pipeline
from ptq_onnx.preparation.prepare import own_faults


def test_of_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fuzz.cases import command

    def fail(*_: object) -> None:
        raise KeyError("a whole graph\n" * 100)

    onnx.save(vit(), tmp_path / "model.onnx")
    monkeypatch.setattr(pipeline, "run_stages", fail)
    found = judge(lambda: command(*SHORT), tmp_path)
    assert (found.finding, found.code, found.admits) == ("", 2, True)
    assert "model.onnx cannot be quantized; a bug here" in found.text
    assert len(found.text) < 500


def test_a_file_that_does_not_run(tmp_path: Path) -> None:
    model = vit()
    split = next(n for n in model.graph.node if n.op_type == "Split")
    split.attribute[0].i = 7
    onnx.save(model, tmp_path / "model.onnx")
    with (
        pytest.raises(ModelError, match="ONNX Runtime refuses the model"),
        own_faults(tmp_path / "model.onnx", "prepared"),
    ):
        raise IndexError


@pytest.mark.parametrize("error", [ModelError("as it is"), OSError(28, "No space left")])
def test_others_pass(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, own_faults(tmp_path / "model.onnx", "prepared"):
        raise error
    assert raised.value is error


def test_an_error_that_only_looks_like_the_systems(tmp_path: Path) -> None:
    """PPQ raises PermissionError for a config that it does not take."""
    onnx.save(vit(), tmp_path / "model.onnx")
    with (
        pytest.raises(ModelError, match="a bug here"),
        own_faults(tmp_path / "model.onnx", "quantized"),
    ):
        raise PermissionError("Can not change property")
