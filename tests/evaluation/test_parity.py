"""Every run holds its rewrites to the original, and undoes one that is another function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run, sample
from small_image_model import image_model, pictures

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization import form, restructure
from ptq_onnx.equalization.linear_weights import move_rows
from ptq_onnx.equalization.rotation import turn
from ptq_onnx.errors import ModelError
from ptq_onnx.evaluation.network import Classifier
from ptq_onnx.evaluation.parity import BOUND, LARGEST, WRONG, Reference
from ptq_onnx.images.opening import Preprocess, open_images
from ptq_onnx.pipeline.quantize import Result, quantize
from ptq_onnx.preparation.model_files import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("parity") / "pictures", 24)


def job(model: Path, folder: Path, output: Path, **options: object) -> Result:
    config = QuantizeConfig(report=False, threads=1, images=12, **options)  # type: ignore[arg-type]
    return quantize(model, config=config, output=output, calib=folder)


def decibels(model: Path, result: Result, folder: Path) -> float:
    preprocess = Preprocess.named("imagenet", 16)
    x = np.concatenate(list(open_images(folder, preprocess).batches(8)))
    one, two = Classifier(model)(x), Classifier(result.output / "quantized.onnx")(x)
    return float(10 * np.log10(np.sum(one**2) / np.sum((one - two) ** 2)))


def test_a_run_states_its_parity(tmp_path: Path, folder: Path) -> None:
    model = image_model(tmp_path / "m.onnx")
    found = job(model, folder, tmp_path / "out").report["parity"]
    assert (found["images"], found["original"], found["undone"]) == (4, True, [])
    assert found["bound"] == BOUND
    assert 0 <= found["fused"] < 1e-5
    assert 0 < found["rewritten"] < 1e-5


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_a_broken_equalisation_is_undone(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """The numbers are those of --no-equalize, and a note says how far it was off."""
    model = image_model(tmp_path / "m.onnx")
    real = move_rows

    def broken(graph, linear, factor, shift):  # type: ignore[no-untyped-def]
        real(graph, linear, factor, shift * 0)

    monkeypatch.setattr("ptq_onnx.equalization.foldings.move_rows", broken)
    found = job(model, folder, tmp_path / "broken", target=target)
    plain = job(model, folder, tmp_path / "plain", target=target, equalize=False)
    (note,) = (n for n in found.report["notes"] if n.startswith("Undone"))
    assert note.startswith("Undone: equalisation. The rewritten model was off by ")
    assert "on 4 calibration images" in note
    assert found.report["parity"]["undone"] == ["equalisation"]
    assert found.report["parity"]["rewritten"] < 1e-5
    first, second = ({t["tensor"]: t["scale"] for t in r.report["tensors"]} for r in (found, plain))
    assert first == second
    assert found.report["formed"] == plain.report["formed"]
    assert decibels(model, found, folder) == pytest.approx(decibels(model, plain, folder))
    assert decibels(model, found, folder) > 25


def test_a_broken_rotation_is_undone(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are those of --no-rotate."""
    model = image_model(tmp_path / "m.onnx")

    def broken(graph, stream, matrix):  # type: ignore[no-untyped-def]
        return turn(graph, stream, 1.1 * matrix)

    monkeypatch.setattr("ptq_onnx.equalization.rotation_choice.turn", broken)
    options: dict[str, Any] = {"target": "tensorrt", "quantize_residual": True}
    found = job(model, folder, tmp_path / "broken", **options)
    plain = job(model, folder, tmp_path / "plain", **options, rotate=False)
    (note,) = (n for n in found.report["notes"] if n.startswith("Undone"))
    assert note.startswith("Undone: rotation. The rewritten model was off by ")
    assert found.report["parity"]["undone"] == ["rotation"]
    assert found.report["rotation"] is None
    first, second = ({t["tensor"]: t["scale"] for t in r.report["tensors"]} for r in (found, plain))
    assert first == second


def test_an_undone_equalisation_leaves_the_rotation(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is prepared anew, and turned by the same matrix."""
    model = image_model(tmp_path / "m.onnx")
    real = move_rows

    def broken(graph, linear, factor, shift):  # type: ignore[no-untyped-def]
        real(graph, linear, factor, shift * 0)

    plain = job(model, folder, tmp_path / "plain", equalize=False, rotate=True)
    monkeypatch.setattr("ptq_onnx.equalization.foldings.move_rows", broken)
    found = job(model, folder, tmp_path / "broken", rotate=True)
    assert found.report["parity"]["undone"] == ["equalisation"]
    assert found.report["rotation"] == plain.report["rotation"]
    assert found.report["rotation"]["turned"][0]["by"] != "none"
    assert found.report["parity"]["rewritten"] < 1e-5
    first, second = ({t["tensor"]: t["scale"] for t in r.report["tensors"]} for r in (found, plain))
    assert first == second


def test_a_broken_form_leaves_the_fused_model(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = image_model(tmp_path / "m.onnx")
    real = restructure.restructure

    def broken(model: ir.Model, *args: object, **kw: object) -> dict[str, int]:
        counts = real(model, *args, **kw)  # type: ignore[arg-type]
        value = [n for n in model.graph if n.op_type == "Linear"][-1].inputs[1]
        assert value is not None
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * 2, name=value.name)
        return {**counts, "Broken": 1}

    for place in (form, restructure):
        monkeypatch.setattr(place, "restructure", broken)
    found = job(model, folder, tmp_path / "out")
    assert found.report["parity"]["undone"] == ["equalisation", "bringing it into form"]
    assert found.report["parity"]["rewritten"] == found.report["parity"]["fused"] < 1e-5
    assert sum(n.startswith("Undone") for n in found.report["notes"]) == 2
    bare = job(model, folder, tmp_path / "bare", bias_correction=False)
    assert bare.report["parity"]["undone"] == found.report["parity"]["undone"]
    assert bare.report["formed"] == "fused.onnx"
    assert not (bare.output / "formed.onnx").exists()
    assert decibels(model, found, folder) > 25


def test_a_fused_model_of_another_function_is_refused(tmp_path: Path) -> None:
    path = image_model(tmp_path / "m.onnx")
    other = load(path)
    x = [np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)]
    assert Reference(path, other, x, 2).off(other).value == 0
    for value in other.graph.initializers.values():
        if value.const_value is not None and value.const_value.numpy().dtype == np.float32:
            value.const_value = ir.tensor(value.const_value.numpy() * 1.5, name=value.name)
    with pytest.raises(ModelError, match=r"cleaned and fused, it is off by .* no longer the same"):
        Reference(path, other, x, 2)


def test_what_off_means(tmp_path: Path) -> None:
    """The root of Σ (a - b)² / Σ a², of the worst output; a graph that breaks is off by most."""
    path = image_model(tmp_path / "m.onnx")
    fused = load(path)
    x = [np.random.default_rng(1).normal(size=(3, 3, 16, 16)).astype(np.float32)]
    reference = Reference(path, fused, x, 3)
    changed = load(path)
    bias = changed.graph.node(-1).inputs[1]
    assert bias is not None
    assert bias.const_value is not None
    delta = np.linspace(0, 0.01, 10).astype(np.float32)
    bias.const_value = ir.tensor(bias.const_value.numpy() + delta, name=bias.name)
    logits = Classifier(path)(x[0]).astype(np.float64)
    expected = np.sqrt(3 * np.sum(delta.astype(np.float64) ** 2) / np.sum(logits**2))
    found = reference.off(changed)
    assert found.value == pytest.approx(expected, rel=1e-3)
    assert found.output == changed.graph.outputs[0].name
    changed.graph.outputs[0].shape = None
    next(n for n in changed.graph if n.op_type == "Conv").op_type = "NoSuchOp"
    assert reference.off(changed).value == LARGEST


def classes_of_pixels(path: Path, change: float = 0.0) -> Path:
    """[batch, 3, 64, 64] → the class of each pixel, int64; weights changed by that part."""
    g = SmallGraph(("batch", 3, 64, 64))
    weight = sample(50, 3, 3, 3) * (1 + change * sample(50, 3, 3, 3, seed=1))
    y = g("ArgMax", g("Conv", "x", weight, pads=[1, 1, 1, 1]), axis=1, keepdims=0)
    g.dtype = onnx.TensorProto.INT64
    onnx.save(g.proto(y), path)
    return path


def test_a_class_that_a_tie_decides_is_no_other_function(tmp_path: Path) -> None:
    """Of whole numbers it counts how many differ, not by how much."""
    path = classes_of_pixels(tmp_path / "m.onnx")
    x = [sample(8, 3, 64, 64, seed=2)]
    reference = Reference(path, load(path), x, 8)
    rounded = load(classes_of_pixels(tmp_path / "rounded.onnx", 2e-4))
    one, other = (run(m, x[0])[0] for m in (load(path), rounded))
    differing = int((one != other).sum())
    assert differing > 1
    assert reference.off(rounded).value == pytest.approx((differing - 1) / one.size)
    assert reference.accepts(reference.off(rounded))
    wrong = load(classes_of_pixels(tmp_path / "wrong.onnx", 0.5))
    assert reference.off(wrong).value > WRONG
