"""A refusal of the integer target names the cause: shared weights, padded windows, missing ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_graph import SmallGraph, sample

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ModelError
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.targets.integer.reasons import of_padding, of_weight, without_form

DIGITS = Path(__file__).resolve().parents[2] / "models/digits_vit.onnx"
CASES = Path(__file__).resolve().parents[3] / "shared/cases"


def test_a_shared_weight_is_named() -> None:
    g = SmallGraph(("b", 4, 8))
    weight = g.const(sample(8, 8), "w")
    x = "x"
    for _ in range(4):
        x = g("MatMul", x, weight)
    alone = g("MatMul", x, sample(8, 8))
    model = g.model(alone)
    nodes = list(model.graph)
    text = of_weight(nodes[0])
    assert "its weight is shared with '/matmul1' and '/matmul2' and 1 more" in text
    assert "--target onnxruntime" in text
    assert of_weight(nodes[-1]) == "its weight does not take the factors of its input"


def test_padding_behind_layout_ops_is_named() -> None:
    g = SmallGraph(("b", 4, 8))
    turned = g("Transpose", "x", perm=[0, 2, 1])
    padded = g("Pad", turned, np.array([0, 0, 0, 0, 0, 2]))
    model = g.model(g("Relu", padded))
    assert "zeros fill up what stands behind it ('/pad1'" in (
        of_padding(model.graph.inputs[0]) or ""
    )
    assert of_padding(model.graph[1].outputs[0]) is None


def test_other_ops_without_a_form_are_counted() -> None:
    g = SmallGraph(("b", 4, 8))
    model = g.model(g("Sin", g("Cos", g("Sin", g("Transpose", "x", perm=[0, 2, 1])))))
    refused = model.graph[1]
    text = without_form(model, refused, lambda node: node.op_type == "Relu" or None)
    assert text == " It has no integer form of 1 Cos, 1 Sin either."
    assert without_form(model, refused, lambda node: node) == ""


def test_integer_kernels_take_bytes(tmp_path: Path) -> None:
    for bits, more in (("8/16/8", ()), ("8/8/8", ("fc1=16",)), ("8/8/8", ("gelu=9",))):
        config = QuantizeConfig(
            target="integer", bits=bits, more_bits=more, images=4, report=False, threads=1
        )
        with pytest.raises(ModelError, match="more than 8 bits, and integer kernels and tables"):
            quantize(DIGITS, config=config, output=tmp_path / "out")


@pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases")
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("shared_block", ["its weight is shared with '/blocks/blocks.0/attn/qkv_1/Add'"]),
        ("sam_encoder", ["It has no integer form of 4 Einsum"]),
    ],
)
def test_the_cases(case: str, words: list[str], tmp_path: Path) -> None:
    config = QuantizeConfig(target="integer", images=2, threads=1, report=False)
    with pytest.raises(ModelError) as caught:
        quantize(CASES / f"{case}.onnx", calib="noise", output=tmp_path / "out", config=config)
    assert "\n" not in str(caught.value)
    assert "two ways" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
