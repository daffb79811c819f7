"""Small files on Qualcomm's emulator: every node there, in integers, with the CPU's numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, sample
from small_image_model import image_model
from small_transformer import Choices, transformer

from npu.convolutions import IMAGE, convolutional, images, swish_image
from npu.swin_block import SIDE, square_heads, swin_block
from npu.test_units import MIXED, decibels, run
from npu.units import file_of, quantizer_for, tokens
from ptq_onnx.api import quantize
from ptq_onnx.equalization.linear_weights import set_linear
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.graph.formula import constant
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.units import complete
from ptq_onnx.targets.checking.check import check
from ptq_onnx.targets.qnn.session import npu_session

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed")


def always_on() -> ir.Model:
    """Each MLP has a hidden channel without weights, whose bias is all there is of it."""
    model = transformer(Choices(), blocks=2)
    for node in model.graph:
        if node.op_type == "Gelu" and (fc1 := node.inputs[0]) is not None:
            linear = fc1.producer()
            assert linear is not None
            weight, bias = (np.array(constant(v)) for v in linear.inputs[1:])
            weight[:, 0], bias[0] = 0, 6
            set_linear(model.graph, linear, weight, bias)
    return model


MODELS = {
    "always on": always_on,
    "plain": lambda: transformer(Choices(), blocks=2),
    "LayerScale": lambda: transformer(Choices(layer_scale=True)),
    "masked, pooled": lambda: transformer(Choices(mask=True, pool=True)),
    "windows": swin_block,
}
CASES = [
    ("always on", "8/8/8", (), 20, 25),
    ("plain", "8/8/8", (), 20, 25),
    ("plain", "8/16/16", (), 32, 40),
    ("plain", "8/8/8", tuple(t for t in MIXED if t != "embed=16"), 22, 25),
    ("plain", "4/16/16", (), 12, 40),
    ("LayerScale", "8/16/16", (), 32, 40),
    ("masked, pooled", "8/16/16", (), 28, 35),
    ("windows", "8/8/8", (), 15, 20),
    ("windows", "8/16/16", (), 30, 30),
]


def on_npu(path: Path, x: np.ndarray) -> np.ndarray:
    session = npu_session(path, threads=1)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: one[None]})[0] for one in x])


@pytest.mark.parametrize(("name", "bits", "more", "floor", "agree"), CASES)
def test_every_node_runs_there_in_integers(
    name: str, bits: str, more: tuple[str, ...], floor: float, agree: float, tmp_path: Path
) -> None:
    model: ir.Model = MODELS[name]()
    count = SIDE * SIDE if name == "windows" else 6
    lowered, left = file_of(quantizer_for(model, bits, more, count))
    assert left == []
    path = tmp_path / "quantized.onnx"
    graphs.save(lowered, path)
    x = tokens(8, seed=1, count=count)
    found = on_npu(path, x)
    assert decibels(run(model, x, 8), found) >= floor
    assert decibels(run(lowered, x, 1), found) >= agree
    if bits == "8/8/8":  # a process of its own, which takes a second
        report = check(path, "qnn")
        assert report.violations == ()
        assert report.skipped == {}
        assert report.facts["units on the NPU"]["Gemm"] >= 4


@pytest.mark.parametrize(("bits", "floor", "agree"), [("8/8/8", 27, 33), ("8/16/16", 42, 44)])
def test_convolutions_pools_and_gates_run_there(
    bits: str, floor: float, agree: float, tmp_path: Path
) -> None:
    """A transposed convolution with a scale per output channel, and an enlarged image, among
    them."""
    lowered, _ = file_of(quantizer_for(convolutional(), bits, inputs=images), image=IMAGE)
    path = tmp_path / "quantized.onnx"
    graphs.save(lowered, path)
    x = images(4, seed=1)
    found = on_npu(path, x)
    assert decibels(run(convolutional(), x, 4), found) >= floor
    assert decibels(run(lowered, x, 1), found) >= agree
    if bits == "8/8/8":
        assert check(path, "qnn").violations == ()


def test_a_swish_of_an_image_has_the_cpus_numbers_there(tmp_path: Path) -> None:
    """In 16 bits, from 32 channels on, the emulator's own is noise."""
    quantizer = quantizer_for(swish_image(), "8/16/16", inputs=images)
    lowered, _ = file_of(quantizer, image=IMAGE)
    path = tmp_path / "quantized.onnx"
    graphs.save(lowered, path)
    x = images(4, seed=1)
    assert decibels(run(lowered, x, 1), on_npu(path, x)) >= 45


@pytest.mark.parametrize("kind", ["Linear", "Conv", "ConvTranspose"])
def test_sums_of_sixteen_bits_are_within_half_a_step(kind: str, tmp_path: Path) -> None:
    """With scales per channel as they come it is 6 steps, and 58 to 60 dB."""
    g = SmallGraph(("batch", 8, 6, 8))
    rank = 2 if kind == "Linear" else 4
    weight = sample(8, 8, *[3] * (rank - 2)) * np.geomspace(0.2, 1, 8)[:, *[None] * (rank - 1)]
    made = g("MatMul" if kind == "Linear" else kind, "x", weight)
    model = g.model(g("Add", made, sample(8)) if kind == "Linear" else made)
    fuse(model)

    def inputs(count: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=(count, 8, 6, 8)).astype(np.float32)

    lowered, left = file_of(quantizer_for(model, "8/16/16", inputs=inputs))
    assert left == []
    path = tmp_path / "quantized.onnx"
    graphs.save(lowered, path)
    x = inputs(2, 1)
    assert decibels(run(lowered, x, 1), on_npu(path, x)) >= 61


def test_square_heads_read_in_eight_bits_compile(tmp_path: Path) -> None:
    """A Reshape of five axes, a Transpose of 16 x 16 and a conversion behind them do not."""
    model = square_heads()
    assert complete(model) == []
    path = tmp_path / "quantized.onnx"
    graphs.save(model, path)
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 16, 16)).astype(np.float32)
    assert decibels(run(model, x, 1), on_npu(path, x)) >= 45


def test_refused_nodes_are_named_with_the_reason(tmp_path: Path) -> None:
    path = image_model(tmp_path / "float.onnx", batch=1)
    graph = graphs.read(path)
    node = next(n for n in graph.graph if n.op_type == "Softmax")
    erf = ir.node("Erf", [node.outputs[0]], name="strange")
    erf.outputs[0].name, erf.outputs[0].type = "strange_out", node.outputs[0].type
    node.outputs[0].replace_all_uses_with(erf.outputs[0])
    erf.replace_input_with(0, node.outputs[0])
    graph.graph.insert_after(node, erf)
    graphs.save(graph, path)
    found = {v.node: v.text for v in check(path, "qnn").violations if v.rule == "compiles"}
    assert "`Erf`" in found["strange"]


def test_evaluate_and_compare_run_there(tmp_path: Path) -> None:
    """The first writes the context too."""
    path = image_model(tmp_path / "float.onnx")
    pictures = np.random.default_rng(0).normal(size=(12, 3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "images.npy", pictures)
    out = tmp_path / "out"
    quantize(
        path, calib=tmp_path / "images.npy", output=out, target="qnn", mixed=False, threads=1,
        report=False, batch_size=2,
    )  # fmt: skip
    context = tmp_path / "context.onnx"
    command = [
        sys.executable, "-m", "ptq_onnx", "evaluate", str(out), "--val",
        str(tmp_path / "images.npy"), "--reference", str(path), "--runtime", "qnn", "--threads",
        "1", "--context", str(context), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sqnr_db"] >= 25
    assert "says nothing of the" in done.stderr
    ops = [node.op_type for node in graphs.outline(context).graph]
    assert ops == ["EPContext"]
    one = Path(tmp_path / "one.npy")  # batches of two in the file: one image has a batch to itself
    np.save(one, pictures[:5])
    command = [
        sys.executable, "-m", "ptq_onnx", "compare", str(out), "--val", str(one), "--runtime",
        "qnn", "--analysis-images", "2", "--threads", "1", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    _, there = json.loads(done.stdout)["contenders"]
    assert there["sqnr_db"] >= 25
