"""What the compiler's log says, and one line where the compiler is absent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_image_model import image_model
from typer.testing import CliRunner

from ptq_onnx.cli.app import app
from ptq_onnx.cli.npu import npu_of
from ptq_onnx.errors import ConfigError
from ptq_onnx.targets.qnn import session
from ptq_onnx.targets.qnn.compiling import Compiler, Refused, read_log

LOG = """
12:00:00.1 [V:onnxruntime:, qnn.cc:1 LogNodeSupport] Validation PASSED for 3 nodes in OrtNodeUnit (Mul) :
	Operator type: DequantizeLinear Node name: dq 1 Node index: 1
	Operator type: Mul Node name: mul Node index: 2
	Operator type: QuantizeLinear Node name: q1 Node index: 3
12:00:00.2 [V:onnxruntime:, qnn.cc:1 LogNodeSupport] Validation FAILED for 3 nodes in OrtNodeUnit (Erf) :
	Operator type: DequantizeLinear Node name: dq2 Node index: 4
	Operator type: Erf Node name: /mlp/Erf Node index: 5
	Operator type: QuantizeLinear Node name: q2 Node index: 6
	REASON : Operators of type `Erf` are not supported by QNN EP.
12:00:00.3 [W:onnxruntime:, qnn.cc:2 CreateQnnNode] QNN.backendValidateOpConfig() failed for node `n` of type `LayerNorm` with error code 3110
12:00:00.4 [V:onnxruntime:, qnn.cc:1 LogNodeSupport] Validation FAILED for 2 nodes in OrtNodeUnit (LayerNormalization) :
	Operator type: DequantizeLinear Node name: dq3 Node index: 7
	Operator type: LayerNormalization Node name: norm Node index: 8
	REASON : Failed to add node.
12:00:00.5 [V:onnxruntime:, qnn.cc:1 LogNodeSupport] Validation PASSED for 1 nodes in OrtNodeUnit (Softmax) :
	Operator type: Softmax Node name: softmax Node index: 9
12:00:00.6 [V:onnxruntime:, qnn.cc:1 LogNodeSupport] Validation PASSED for 1 nodes in OrtNodeUnit (DequantizeLinear) :
	Operator type: DequantizeLinear Node name: last Node index: 10
"""  # noqa: E501


def test_a_log_names_refused_nodes_and_those_in_float() -> None:
    found = read_log(LOG, "The model is refused.\n", 1)
    assert found.refused == (
        Refused("/mlp/Erf", "Erf", "Operators of type `Erf` are not supported by QNN EP"),
        Refused(
            "norm",
            "LayerNormalization",
            "HTP has no LayerNorm of these types and shapes (backendValidateOpConfig)",
        ),
    )
    assert dict(found.floats) == {"softmax": "Softmax"}
    assert dict(found.units) == {"Mul": 1, "Softmax": 1, "DequantizeLinear": 1}
    assert found.error == "The model is refused."


def test_a_process_that_dies_is_an_error() -> None:
    assert read_log("", "", -11).error == "its process ended with code -11"
    assert read_log("", "", 0).error == ""


def test_without_the_wheel_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    session.plugin.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    with pytest.raises(ConfigError, match=r"not installed.*pip install --no-deps onnxruntime-qnn"):
        session.npu_session(b"")
    assert Compiler(session.Device())("model.onnx") is None
    session.plugin.cache_clear()


def test_options_of_the_npu_belong_to_it() -> None:
    assert npu_of("onnxruntime", None, None) is None
    for given, message in (
        (("onnxruntime", "60", None), "--soc belongs to --runtime qnn"),
        (("onnxruntime", None, None, "a.onnx"), "--context belongs to --runtime qnn"),
        (("qnn", None, None, __file__), "exists already"),
        (("tpu", None, None), "There is no runtime 'tpu'; choose one of onnxruntime, qnn"),
    ):
        with pytest.raises(ConfigError, match=message):
            npu_of(*given)
    with pytest.raises(ConfigError, match="--htp-arch v73: expected a number"):
        session.Device(htp_arch="v73")


def test_check_takes_them_for_qnn_alone(tmp_path: Path) -> None:
    path = image_model(tmp_path / "float.onnx")
    result = CliRunner().invoke(app, ["check", str(path), "--target", "tensorrt", "--soc", "60"])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == "--soc belongs to --target qnn."
