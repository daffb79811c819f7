"""Which output holds logits: by the end of the graph, not by its shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from small_graph import SmallGraph, sample

from ptq_onnx.calibration.class_output import class_outputs, feature_outputs, logits_output
from ptq_onnx.calibration.preprocess_check import MOST, check_preprocess
from ptq_onnx.evaluation.network import Classifier
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.images.opening import Preprocess, open_images
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.preparation.prepare import prepare

Build = Callable[[SmallGraph], str]
W, B = sample(8, 5), sample(5)


def norm(g: SmallGraph) -> str:
    return g("LayerNormalization", "x", np.ones(8), np.zeros(8), axis=-1)


def first(g: SmallGraph) -> str:
    return g("Gather", norm(g), np.array(0), axis=1)


def linear(g: SmallGraph, x: str, seed: int = 0) -> str:
    return g("Add", g("MatMul", x, sample(8, 5, seed=seed)), sample(5, seed=seed + 1))


def unit(g: SmallGraph, x: str) -> str:
    return g("Div", x, g("ReduceL2", x, np.array([-1]), keepdims=1))


LOGITS: dict[str, Build] = {
    "head": lambda g: linear(g, first(g)),
    "gemm": lambda g: g("Gemm", first(g), W, B),
    "pooled": lambda g: linear(g, g("ReduceMean", norm(g), np.array([1]), keepdims=0)),
    "softmax": lambda g: g("Softmax", linear(g, first(g)), axis=-1),
    "probabilities without bias": lambda g: g("Softmax", g("MatMul", first(g), W), axis=-1),
    "two heads": lambda g: g("Div", g("Add", linear(g, first(g)), linear(g, first(g), 7)), 2.0),
    "pooled classes": lambda g: g("ReduceMean", linear(g, norm(g)), np.array([1]), keepdims=0),
}
FEATURES: dict[str, Build] = {
    "class token of DINOv2": first,
    "mean of the tokens": lambda g: g("ReduceMean", norm(g), np.array([1]), keepdims=0),
    "pooler": lambda g: g("Tanh", linear(g, first(g))),
    "CLIP, projected": lambda g: g("MatMul", first(g), W),
    "CLIP, normalised": lambda g: unit(g, g("MatMul", first(g), W)),
    "normalised with bias": lambda g: unit(g, linear(g, first(g))),
    "normalised and scaled": lambda g: g("Mul", unit(g, g("MatMul", first(g), W)), 100.0),
    "a residual branch": lambda g: g("Add", first(g), g("Gemm", first(g), sample(8, 8), sample(8))),
}


def model(build: Build, name: str = "y") -> ir.Model:
    g = SmallGraph(("batch", 6, 8))
    made = build(g)
    g.nodes.append(helper.make_node("Identity", [made], [name], "/last"))
    found = g.model(name)
    graphs.clean(found)
    fuse(found)
    return found


@pytest.mark.parametrize("name", LOGITS)
def test_logits(name: str) -> None:
    found = model(LOGITS[name])
    assert class_outputs(found) == ["y"]
    assert logits_output(found) == "y"
    assert feature_outputs(found) == []


@pytest.mark.parametrize("name", FEATURES)
def test_features_are_no_logits(name: str) -> None:
    found = model(FEATURES[name])
    assert class_outputs(found) == ["y"]
    assert logits_output(found) is None
    # A projection without bias, and a sum, may be classes all the same
    certain = name not in ("CLIP, projected", "a residual branch")
    assert feature_outputs(found) == (["y"] if certain else [])


def test_a_name_that_says_features() -> None:
    found = model(LOGITS["head"], "image_embeds")
    assert logits_output(found) is None
    assert feature_outputs(found) == ["image_embeds"]


def cut(path: Path, folder: Path) -> Path:
    """A sample model without its head: what a feature extractor of it gives."""
    prepared = prepare(path)
    head = prepared.model.graph.outputs[0].producer()
    assert head is not None
    name = str(head.inputs[0].name)  # type: ignore[union-attr]
    proto: Any = ir.to_proto(graphs.to_standard(prepared.model))
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info(name, 1, ["batch", 192]))
    onnx.save(proto, folder / "cut.onnx")
    return folder / "cut.onnx"


@pytest.mark.real
def test_features_of_a_sample_model_would_raise_a_false_alarm(
    shared: Path, real_models: dict[str, Path], tmp_path: Path
) -> None:
    """DeiT-Ti's features under its own normalisation: the softmax of them says "[0, 255]"."""
    path = cut(real_models["deit"], tmp_path)
    plain = Preprocess((0.0,) * 3, (1.0,) * 3, (224, 224))
    images = np.concatenate(
        list(open_images(shared / "imagenet/calib", plain, limit=MOST).batches(8))
    )
    found = check_preprocess(Classifier(path, 1), images, Preprocess.named("imagenet"))
    assert found.warning is not None
    assert logits_output(prepare(path).model) is None
    assert logits_output(prepare(real_models["deit"]).model) == "logits"


def test_a_bias_that_was_not_fused() -> None:
    """An Add of a constant behind a product with a constant, either way round; of nothing else."""
    heads: list[Callable[[SmallGraph], str]] = [
        lambda g: g("Add", g("MatMul", "x", W), B),
        lambda g: g("Add", B, g("MatMul", "x", W)),
        lambda g: g("Sub", g("MatMul", "x", W), B),
        lambda g: g("Add", g("Gemm", "x", W), B),
    ]
    others: list[Callable[[SmallGraph], str]] = [
        lambda g: g("Add", g("Relu", "x"), sample(8)),
        lambda g: g("Add", g("MatMul", "x", g("Transpose", "x", perm=[1, 0])), sample(2)),
        lambda g: g("Mul", g("MatMul", "x", W), B),
        lambda g: g("Add", "x", sample(8)),
        lambda g: g("Add", g("MatMul", "x", W), g("MatMul", "x", W)),
    ]
    for make in [*heads, *others]:
        g = SmallGraph((2, 8))
        out = make(g)
        assert (logits_output(g.model(out)) == out) is (make in heads), out


def test_all_that_is_joined_must_be_features() -> None:
    """Whichever stands first; of what only moves a tensor its own input decides, not its shape."""
    cases: list[tuple[Build, bool]] = [
        (lambda g: g("Concat", first(g), first(g), axis=1), True),
        (lambda g: g("Concat", first(g), linear(g, first(g)), axis=1), False),
        (lambda g: g("Concat", linear(g, first(g)), first(g), axis=1), False),
        (lambda g: g("Reshape", first(g), g("Shape", g("Relu", first(g)))), True),
        (lambda g: g("Reshape", linear(g, first(g)), g("Shape", linear(g, first(g)))), False),
    ]
    for build, features in cases:
        assert feature_outputs(model(build)) == (["y"] if features else [])
