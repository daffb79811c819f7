"""Every op between input and output on codes, as an NPU takes them."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from small_graph import SmallGraph, sample
from small_transformer import Choices, transformer

from npu.convolutions import IMAGE, convolutional, images, swish_image
from npu.swin_block import SIDE, square_heads, swin_block
from npu.units import file_of, quantizer_for, tokens
from ptq_onnx.blocks.walking import keeps_range
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.pipeline.writing import notes_on_sizes
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.qdq.unit_numbers import Numbers, joined, numbers_of
from ptq_onnx.qdq.units import complete
from ptq_onnx.quantizers.base import SiteQuantizer
from ptq_onnx.targets.checking.check import check
from ptq_onnx.targets.checking.coding import Coding
from ptq_onnx.targets.qnn.compiling import Compiler

CHOICES = {
    "packed": Choices(),
    "apart": Choices(packed=False, scale="before"),
    "masked, pooled": Choices(mask=True, pool=True, layer_scale=True),
    "relu": Choices(activation="Relu"),
}
MIXED = ("residual1=16", "residual2=16", "embed=16", "norm1=16")
WIDTHS = {"8/8/8": (), "8/16/16": (), "8/8/8, mixed": MIXED}
UINT8, UINT16 = ir.DataType.UINT8, ir.DataType.UINT16


def decibels(expected: np.ndarray, found: np.ndarray) -> float:
    noise = float(((expected - found).astype(np.float64) ** 2).sum())
    return float(10 * np.log10(float((expected.astype(np.float64) ** 2).sum()) / max(noise, 1e-30)))


def run(model: ir.Model, x: np.ndarray, batch: int) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    data = graphs.serialize(model)
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: x[i : i + batch]})[0] for i in range(0, len(x), batch)]
    return np.concatenate(parts)


@cache
def small(bits: str, blocks: int = 1) -> SiteQuantizer:
    """Of the plain transformer; none of these tests changes it."""
    return quantizer_for(transformer(Choices(), blocks=blocks), bits)


@cache
def convolutions(bits: str) -> SiteQuantizer:
    return quantizer_for(convolutional(), bits, inputs=images)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CHOICES)
def test_nothing_is_left_in_float(
    name: str, width: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compiler, "__call__", lambda *_: None)  # that is test_npu.py's
    model = transformer(CHOICES[name], blocks=2)
    more = [text for text in WIDTHS[width] if text != "embed=16"]
    lowered, left = file_of(quantizer_for(model, width.partition(",")[0], more))
    assert left == []
    path = tmp_path / "quantized.onnx"
    graphs.save(lowered, path)
    report = check(path, "qnn")
    assert report.violations == ()
    assert report.quantized_linears == report.linears
    assert report.quantized_products == report.products
    x = tokens(16, seed=1)
    assert decibels(run(model, x, 16), run(lowered, x, 1)) >= (33 if width == "8/16/16" else 17)


def test_it_computes_what_lowering_alone_computes() -> None:
    """Codes of layout ops, conversions and int32 biases change nothing that is not rounding."""
    quantizer = small("8/16/16", 2)
    x = tokens(16, seed=1)
    plain = run(lower(quantizer.model, quantizer.specs), x, 16)
    assert decibels(plain, run(file_of(quantizer)[0], x, 1)) >= 60


def test_the_batch_is_fixed_and_no_shape_is_computed() -> None:
    lowered, _ = file_of(quantizer_for(transformer(Choices(pool=True)), "8/8/8"), batch=4)
    assert lowered.graph.inputs[0].shape[0] == 4
    shapes = [v.shape for node in lowered.graph for v in node.outputs]
    assert all(s is not None and all(isinstance(d, int) for d in s) for s in shapes)
    assert not [n for n in lowered.graph if n.op_type in ("Shape", "Expand")]


def test_biases_are_int32_by_the_scales_of_the_product() -> None:
    lowered, _ = file_of(small("8/8/8"))
    linears = [n for n in lowered.graph if n.op_type == "Linear"]
    assert len(linears) == 7
    for node in linears:
        data, weight, bias = (Coding(v.producer()) for v in node.inputs)
        assert bias.dtype == ir.DataType.INT32
        np.testing.assert_allclose(bias.scale, data.scale * weight.scale, rtol=1e-6)


def test_multipliers_of_sixteen_bits_are_numbers_that_the_npu_holds() -> None:
    """s_x s_w / s_y of every channel has 10 bits behind the first, for at most 1/2048 of s_w."""
    quantizer = small("8/16/16")
    lowered, _ = file_of(quantizer)
    names = {n.name: str(n.inputs[1].name) for n in quantizer.model.graph if n.op_type == "Linear"}
    linears = [n for n in lowered.graph if n.op_type == "Linear"]
    assert len(linears) == 7
    for node in linears:
        data, weight = (Coding(v.producer()).scale for v in node.inputs[:2])
        (quantize,) = [use.node for use in node.outputs[0].uses()]
        mantissa, _ = np.frexp(data * weight / Coding(quantize).scale)
        np.testing.assert_allclose(mantissa * 2048, np.rint(mantissa * 2048), atol=1e-3)
        own = quantizer.specs[names[node.name]].scale
        np.testing.assert_allclose(weight, own, rtol=1 / 2048)
        assert not np.array_equal(weight, own)
    plain = file_of(small("8/8/8"))[0]
    node = next(n for n in plain.graph if n.op_type == "Linear")
    specs = small("8/8/8").specs
    np.testing.assert_array_equal(
        Coding(node.inputs[1].producer()).scale, specs[names[node.name]].scale
    )


def test_weights_of_four_bits_are_stored_in_four() -> None:
    """With a scale per output channel, and what asks for 8 in int8."""
    quantizer = quantizer_for(transformer(Choices()), "4/16/16", ["fc2=8"])
    lowered, left = file_of(quantizer)
    assert left == []
    weights = [Coding(n.inputs[1].producer()) for n in lowered.graph if n.op_type == "Linear"]
    assert Counter(w.dtype for w in weights) == {ir.DataType.INT4: 6, ir.DataType.INT8: 1}
    assert {w.axis for w in weights} == {1}
    plain = lower(quantizer.model, quantizer.specs)
    x = tokens(16, seed=1)
    assert decibels(run(plain, x, 16), run(lowered, x, 1)) >= 60


def test_norms_have_uint8_gamma_without_loss_and_beta_in_steps_of_the_output() -> None:
    quantizer = small("8/16/16", 2)
    lowered, _ = file_of(quantizer)
    floats = {n.name: n for n in quantizer.model.graph if n.op_type == "LayerNormalization"}
    norms = [n for n in lowered.graph if n.op_type == "LayerNormalization"]
    assert len(norms) == 5
    for node in norms:
        gamma = Coding(node.inputs[1].producer())
        codes = gamma.node.inputs[0].const_value.numpy().astype(np.float64)
        real = (codes - gamma.zero_point) * gamma.scale
        assert gamma.dtype == UINT8
        wanted = floats[node.name].inputs[1].const_value.numpy()
        np.testing.assert_allclose(real, wanted, rtol=1e-4)
        if len(node.inputs) > 2:
            (quantize,) = [use.node for use in node.outputs[0].uses()]
            beta = Coding(node.inputs[2].producer())
            assert beta.dtype == ir.DataType.INT32
            assert beta.scale == Coding(quantize).scale


def test_eight_bit_codes_are_held_exactly_by_sixteen() -> None:
    narrow = Numbers(np.float32(0.02), 37, UINT8)
    wide = narrow.wider()
    assert (wide.dtype, wide.zero) == (UINT16, 37 * 257)
    codes = np.arange(256)
    values = (codes - narrow.zero) * np.float64(narrow.scale)
    again = np.rint(values / np.float64(wide.scale)) + wide.zero
    np.testing.assert_array_equal(again, codes * 257)
    np.testing.assert_allclose(wide.range, narrow.range, rtol=1e-6)


def test_parts_of_several_ranges_share_the_range_that_holds_all() -> None:
    parts = [Numbers(np.float32(0.01), 0, UINT8), Numbers(np.float32(0.02), 128, UINT8)]
    both = joined(parts)
    assert both is not None
    low, high = both.range
    assert low <= -2.56 + 0.03
    assert high >= 2.55 - 0.03
    assert joined([]) is None


def test_widths_differ_where_they_are_asked_for() -> None:
    quantizer = quantizer_for(transformer(Choices()), "8/8/8", ["residual1=16"])
    lowered, _ = file_of(quantizer)
    kinds = {
        node.op_type: {Coding(use.node).dtype for use in node.outputs[0].uses()}
        for node in lowered.graph
        if node.op_type in ("Add", "Softmax", "Gelu")
    }
    assert kinds["Softmax"] == kinds["Gelu"] == {UINT8}
    conversions = [
        n
        for n in lowered.graph
        if n.op_type == "QuantizeLinear"
        and (made := n.inputs[0].producer()) is not None
        and made.op_type == "DequantizeLinear"
    ]
    assert conversions
    assert {Coding(n).dtype for n in conversions} <= {UINT8, UINT16}


def test_activation_functions_of_several_ops_have_codes_between_them() -> None:
    g = SmallGraph(("batch", 6, 8))
    hidden = g("Add", g("MatMul", "x", sample(8, 32, seed=1)), sample(32, seed=2))
    x = g("Mul", hidden, g("Sigmoid", g("Mul", hidden, 1.702)))
    model = g.model(g("Add", g("MatMul", x, sample(32, 8, seed=3)), sample(8, seed=4)))
    fuse(model)
    assert "QuickGelu" in [n.op_type for n in model.graph]
    lowered, left = file_of(quantizer_for(model, "8/16/16"))
    assert left == []
    (sigmoid,) = [n for n in lowered.graph if n.op_type == "Sigmoid"]
    (quantize,) = [use.node for use in sigmoid.outputs[0].uses()]
    assert Coding(quantize).dtype == UINT16
    assert Coding(quantize).scale == np.float32(1 / 65535)
    x = tokens(16, seed=1)
    assert decibels(run(model, x, 16), run(lowered, x, 1)) >= 35


def test_splits_become_slices_and_axes_of_one_are_reshaped_away() -> None:
    quantizer = quantizer_for(swin_block(), "8/16/16", count=SIDE * SIDE)
    lowered, left = file_of(quantizer)
    assert left == []
    kinds = {n.op_type for n in lowered.graph}
    assert {"Slice", "Reshape", "Concat"} <= kinds
    assert not {"Split", "Squeeze", "Unsqueeze", "Gather"} & kinds
    x = tokens(8, seed=1, count=SIDE * SIDE)
    assert decibels(run(swin_block(), x, 8), run(lowered, x, 1)) >= 30


def test_only_what_is_dequantized_has_numbers() -> None:
    """Not what else reads constants that would do for them, nor what no op makes."""
    g = SmallGraph((2, 3))
    scale, zero = g.const(np.float32(0.5), "scale"), g.const(np.uint8(7), "zero")
    codes = g("QuantizeLinear", "x", scale, zero)
    made = g("DequantizeLinear", codes, scale, zero)
    clipped = g("Clip", made, scale, g.const(np.float32(2), "most"))
    model = g.model(clipped)
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    assert numbers_of(values[made]) == Numbers(np.float32(0.5), 7, UINT8)
    for other in (values[codes], values[clipped], model.graph.inputs[0]):
        assert numbers_of(other) is None


def test_convolutions_pools_and_gates_are_all_on_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every size of the image fixed, where the model leaves it open."""
    monkeypatch.setattr(Compiler, "__call__", lambda *_: None)
    quantizer = convolutions("8/16/16")
    lowered, left = file_of(quantizer, image=IMAGE)
    assert left == []
    assert lowered.graph.inputs[0].shape == ir.Shape([1, *IMAGE])
    path = tmp_path / "quantized.onnx"
    graphs.save(lowered, path)
    report = check(path, "qnn")
    assert report.violations == ()
    assert report.quantized_linears == report.linears == 7
    x = images(4, seed=1)
    assert decibels(run(convolutional(), x, 4), run(lowered, x, 1)) >= 45


def test_it_is_told_that_the_size_of_images_is_fixed() -> None:
    (note,) = notes_on_sizes(convolutional(), IMAGE, "qnn")
    assert "takes images of 16x24 alone" in note
    assert notes_on_sizes(transformer(Choices()), IMAGE, "qnn") == []
    assert notes_on_sizes(SmallGraph(("batch", *IMAGE)).model("x"), IMAGE, "qnn") == []


def test_transposed_convolutions_have_a_scale_per_output_channel() -> None:
    lowered, _ = file_of(convolutions("8/8/8"), image=IMAGE)
    (node,) = [n for n in lowered.graph if n.op_type == "ConvTranspose"]
    data, weight, bias = (Coding(v.producer()) for v in node.inputs)
    assert (weight.dtype, weight.axis) == (ir.DataType.INT8, 1)
    largest = np.abs(weight.node.inputs[0].const_value.numpy()).max(axis=(0, 2, 3))
    assert largest.tolist() == [127] * 6
    np.testing.assert_allclose(bias.scale, data.scale * weight.scale, rtol=1e-6)


@pytest.mark.parametrize("kind", ["MaxPool", "Resize"])
def test_ops_that_pick_or_interpolate_keep_the_numbers(kind: str) -> None:
    """In the file and in the specs, whatever the range of what they make."""
    quantizer = convolutions("8/8/8")
    lowered, _ = file_of(quantizer, image=IMAGE)
    (node,) = [n for n in lowered.graph if n.op_type == kind]
    (quantize,) = [use.node for use in node.outputs[0].uses()]
    assert Numbers.of(quantize) == Numbers.of(node.inputs[0].producer())
    (node,) = [n for n in quantizer.model.graph if n.op_type == kind]
    read, made = (quantizer.specs[str(v.name)] for v in (node.inputs[0], node.outputs[0]))
    assert (made.scale, made.zero_point) == (read.scale, read.zero_point)


def test_a_cubic_resize_has_numbers_of_its_own() -> None:
    """It overshoots."""
    cubic = ir.node("Resize", [ir.val("x")], {"mode": "cubic"})
    assert not keeps_range(cubic)
    assert keeps_range(ir.node("Resize", [ir.val("x")]))


def test_conversions_to_fewer_bits_stand_in_front_of_what_only_orders() -> None:
    model, plain = square_heads(), square_heads()
    assert complete(model) == []
    ops = [n.op_type for n in model.graph]
    pair = ["QuantizeLinear", "DequantizeLinear"]
    assert ops == [*pair, *pair, "Reshape", *pair, "Transpose", *pair]
    kinds = [Coding(n).dtype for n in model.graph if n.op_type == "QuantizeLinear"]
    assert kinds == [UINT16, UINT8, UINT8, UINT8]
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(run(model, x, 1), run(plain, x, 1))


@pytest.mark.parametrize(("bits", "apart"), [("8/16/16", 1), ("8/8/8", 0)])
def test_a_swish_is_kept_apart_in_sixteen_bits(bits: str, apart: int) -> None:
    lowered, left = file_of(quantizer_for(swish_image(), bits, inputs=images), image=IMAGE)
    assert left == []
    relus = [n for n in lowered.graph if n.op_type == "Relu"]
    assert len(relus) == apart
    for node in relus:
        (quantize,) = [use.node for use in node.outputs[0].uses()]
        assert Numbers.of(node.inputs[0].producer()) == Numbers.of(quantize)
    x = images(4, seed=1)
    assert decibels(run(swish_image(), x, 4), run(lowered, x, 1)) >= 30
