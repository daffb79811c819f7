"""The size of a model is its own files, and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptq_onnx.analysis.compare import compare
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ModelError
from ptq_onnx.files.model_size import data_files, model_bytes
from ptq_onnx.images.opening import Preprocess, open_images
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.preparation.inspection import inspect
from ptq_onnx.targets.timing.timed_model import read_subject


def save(path: Path, *locations: str, inside: bool = False) -> Path:
    """x [batch, 3, 4, 4] → flat → a product per file of data; ``inside``: the last in an If."""
    first = numpy_helper.from_array(np.array([0, 48]), "shape")
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y0"], "/flat")]
    constants, name = [first], "y0"
    for index, location in enumerate(locations):
        weight = numpy_helper.from_array(np.ones((48, 48), np.float32), f"w{index}")
        onnx.external_data_helper.set_external_data(weight, location)
        data = weight.raw_data
        (path.parent / location).write_bytes(data)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        out = f"y{index + 1}"
        if inside and index == len(locations) - 1:
            held = helper.make_node("Constant", [], ["held"], value=weight)
            product = helper.make_node("MatMul", [name, "held"], ["branch"])
            value = helper.make_tensor_value_info("branch", TensorProto.FLOAT, None)
            branch = helper.make_graph([held, product], "branch", [], [value])
            constants.append(numpy_helper.from_array(np.array(True), "yes"))
            nodes.append(
                helper.make_node("If", ["yes"], [out], then_branch=branch, else_branch=branch)
            )
        else:
            constants.append(weight)
            nodes.append(helper.make_node("MatMul", [name, f"w{index}"], [out], f"/m{index}"))
        name = out
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 48])],
        constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def test_foreign_files_do_not_count(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx")
    for name in ("m.onnx.bak", "m.onnx.data", "m.onnx.json"):
        (tmp_path / name).write_bytes(bytes(1000))
    assert data_files(path) == ()
    assert model_bytes(path) == path.stat().st_size


@pytest.mark.parametrize("inside", [False, True])
def test_external_data_counts_under_any_name(tmp_path: Path, inside: bool) -> None:
    path = save(tmp_path / "m.onnx", "weights.bin", "other.weights", inside=inside)
    assert [f.name for f in data_files(path)] == ["weights.bin", "other.weights"]
    expected = path.stat().st_size + 2 * 48 * 48 * 4
    assert model_bytes(path) == expected
    shared = save(tmp_path / "twice.onnx", "one.bin", "one.bin")
    assert model_bytes(shared) == shared.stat().st_size + 48 * 48 * 4


def test_missing_data_and_files_that_are_no_model(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", "weights.bin")
    (tmp_path / "weights.bin").unlink()
    assert model_bytes(path) == path.stat().st_size
    with pytest.raises(ModelError, match=r"weights\.bin' is missing"):
        read_subject(path)
    path.write_bytes(b"no model")
    with pytest.raises(ModelError, match="cannot be read"):
        model_bytes(path)


def test_every_command_counts_the_same(tmp_path: Path) -> None:
    """benchmark, inspect, compare and the report of quantize, beside a foreign file."""
    path = save(tmp_path / "m.onnx", "weights.bin")
    (tmp_path / "m.onnx.bak").write_bytes(bytes(777))
    expected = path.stat().st_size + 48 * 48 * 4
    assert read_subject(path).bytes == expected
    assert inspect(path).bytes == expected
    pictures = np.random.default_rng(0).integers(0, 255, (4, 4, 4, 3), np.uint8)
    preprocess = Preprocess.named("inception")
    preprocess = type(preprocess)(**{**preprocess.__dict__, "size": (4, 4)})
    images = open_images(pictures, preprocess)
    found = compare([path], images, reference=path, threads=1)
    assert [c.bytes for c in found.contenders] == [expected, expected]
    config = QuantizeConfig(quantizer="vanilla", report=False, threads=1)
    output = tmp_path / "out"
    report = quantize(path, config=config, calib=pictures, output=output).report
    assert report["model"]["bytes"] == expected
    assert report["sizes"]["quantized"] == (output / "quantized.onnx").stat().st_size
