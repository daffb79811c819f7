"""``--float16``: the float part of a TensorRT file in 16 bits, its codes as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper
from small_graph import SmallGraph, run, text
from test_targets import decibels

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError, ModelError
from ptq_onnx.evaluation.evaluate import logits
from ptq_onnx.images.opening import open_images
from ptq_onnx.pipeline.preprocessing import resolve_preprocess
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.half import half, to_float16
from ptq_onnx.qdq.small_scales import enlarge_small_scales, power_of_two
from ptq_onnx.qdq.sums import sums_to_means
from ptq_onnx.targets.checking.check import check

ROOT = Path(__file__).resolve().parents[2]
MODEL, IMAGES = ROOT / "models/digits_vit.onnx", ROOT / "img/digits"
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The digits model for TensorRT, its float part in 32 and in 16 bits."""
    folder = tmp_path_factory.mktemp("half")
    found = []
    for name, float16 in (("whole", False), ("half", True)):
        config = QuantizeConfig(
            target="tensorrt", float16=float16, images=64, report=False, threads=1
        )
        result = quantize(MODEL, config=config, output=folder / name, calib=IMAGES / "calib")
        assert any("16 bits" in note for note in result.report["notes"]) == float16
        found.append(result.output / "quantized.onnx")
    return found[0], found[1]


def constants(path: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(path).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def test_every_float_between_the_two_casts_has_16_bits(files: tuple[Path, Path]) -> None:
    model = onnx.load(files[1])
    onnx.checker.check_model(model, full_check=True)
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert [cast.attribute[0].i for cast in casts] == [HALF, FLOAT]
    assert casts[0].input[0] == model.graph.input[0].name
    assert casts[1].output[0] == model.graph.output[0].name
    for value in (model.graph.input[0], model.graph.output[0]):
        assert value.type.tensor_type.elem_type == FLOAT
    assert not [t.name for t in model.graph.initializer if t.data_type == FLOAT]
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    types = {v.name: v.type.tensor_type.elem_type for v in inferred}
    made = {name for node in model.graph.node for name in node.output} - {casts[1].output[0]}
    assert made <= types.keys()
    assert FLOAT not in types.values()
    stated = {v.name: v.type.tensor_type.elem_type for v in onnx.load(files[1]).graph.value_info}
    assert {n: t for n, t in stated.items() if n in made} == {n: types[n] for n in made}
    whole = onnx.load(files[0]).graph
    floats = [v for v in whole.value_info if v.type.tensor_type.elem_type == FLOAT]
    assert len(floats) > 300
    assert list(stated.values()).count(HALF) == len(floats) + 2  # image and logits as well


def test_codes_stay_and_constants_are_the_nearest(files: tuple[Path, Path]) -> None:
    whole, halves = map(constants, files)
    # Sums over tokens became means.
    assert all("_mean_" in name for name in whole.keys() ^ halves.keys())
    codes = [name for name, array in whole.items() if array.dtype != np.float32]
    assert sum(whole[name].ndim > 1 for name in codes) == 26
    for name in codes:
        np.testing.assert_array_equal(halves[name], whole[name])
        assert halves[name].dtype == whole[name].dtype
    for name in (whole.keys() & halves.keys()) - set(codes):
        assert halves[name].dtype == np.float16
        error = np.abs(halves[name].astype(np.float64) - whole[name])
        assert (error <= np.maximum(np.abs(whole[name]) * 2.0**-11, 2.0**-25)).all(), name
    assert files[1].stat().st_size < 0.95 * files[0].stat().st_size


def test_it_conforms_and_computes_the_same(files: tuple[Path, Path]) -> None:
    report = check(files[1], "tensorrt")
    assert report.violations == ()
    assert (report.quantized_linears, report.quantized_products) == (26, 12)
    source = open_images(IMAGES / "val", resolve_preprocess(MODEL, QuantizeConfig()), limit=32)
    plain, whole, halves = (logits(path, source, threads=1) for path in (MODEL, *files))
    assert decibels(whole, halves) > 28
    assert abs(decibels(plain, halves) - decibels(plain, whole)) < 1
    assert (halves.argmax(1) == whole.argmax(1)).mean() >= 31 / 32


def test_8_bit_floats_between_16_bit_floats(short: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(
        target="tensorrt", precision="fp8", float16=True, images=4, report=False, threads=1
    )
    quantize(short, config=config, output=tmp_path / "out", calib=IMAGES / "calib")
    path = tmp_path / "out/quantized.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    assert check(path, "tensorrt").violations == ()
    types = {tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert types == {HALF, TensorProto.FLOAT8E4M3FN, TensorProto.INT64}


@pytest.mark.parametrize(
    ("number", "scale", "text"),
    [
        ([1.0, -65505.0], False, "at most 65504, found 65505"),
        ([1.0, np.finfo(np.float32).min], False, "at most 65504"),
        ([1.0, 6.1e-5], True, "at least 2^-14"),
        (0.0, True, "at least 2^-14"),
        (1e-9, False, "that 16 bits hold, found 1e-09"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(
    number: float | list[float], scale: bool, text: str
) -> None:
    with pytest.raises(ModelError, match=r"^Constant 'c': .*; leave out --float16.$") as error:
        half(np.array(number, np.float32), "c", scale)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_that_16_bits_hold() -> None:
    given = np.array([65504.0, -np.inf, 1e-9, 2.0**-24, 0.1], np.float32)
    expected = np.array([65504.0, -np.inf, 0.0, 2.0**-24, np.float16(0.1)], np.float64)
    np.testing.assert_array_equal(half(given, "c"), expected)
    assert half(np.array(2.0**-14, np.float32), "c", scale=True) == 2.0**-14
    assert half(np.array(0, np.float32), "c").shape == ()


def test_a_constant_of_the_graph_is_refused_and_left_alone() -> None:
    g = SmallGraph((2, 3))
    g.const(np.full(3, 70000.0), "large")
    model = g.model(g("Add", "x", "large"))
    with pytest.raises(ModelError, match="'large': expected at most 65504, found 70000"):
        to_float16(model)
    assert model.graph.initializers["large"].dtype == ir.DataType.FLOAT


def test_attributes_and_readers_that_need_32_bits() -> None:
    g = SmallGraph((1, 1, 4, 4))
    ones = numpy_helper.from_array(np.ones(1, np.float32))
    scales = g.const(np.array([1.0, 1.0, 2.0, 2.0]), "scales")
    large = g("Resize", "x", "", scales, mode="nearest")
    shape = g("Shape", large)
    filled = g("ConstantOfShape", shape, value=ones)
    zeros = g("ConstantOfShape", shape)
    number = g("Constant", value_float=0.5)
    numbers = g("Constant", value_floats=[1.0, 2.0] * 4)
    cast = g("Cast", shape, to=FLOAT)
    sized = g("ReduceSum", g("Mul", cast, scales), keepdims=0)
    total = large
    for other in (filled, zeros, number, numbers, sized):
        total = g("Add", total, other)
    before = g.model(total)
    x = np.random.default_rng(0).normal(size=(1, 1, 4, 4)).astype(np.float32)
    expected = run(before, x)[0]
    model = to_float16(before)
    assert [v.name for v in model.graph.outputs] == [v.name for v in before.graph.outputs]
    assert model.graph.initializers["scales"].dtype == ir.DataType.FLOAT
    assert model.graph.initializers["scales_half"].dtype == ir.DataType.FLOAT16
    proto = onnx.load_from_string(graphs.serialize(model))
    onnx.checker.check_model(proto, full_check=True)
    kinds = {node.op_type for node in proto.graph.node}
    assert {"Resize", "Constant", "ConstantOfShape"} <= kinds
    np.testing.assert_allclose(run(model, x)[0], expected, atol=0.02)
    np.testing.assert_array_equal(run(before, x)[0], expected)


def test_statistics_of_a_norm_and_whole_numbers_keep_their_types() -> None:
    """Mean and inverse deviation have the type that ``stash_type`` says, whatever the input's."""
    g = SmallGraph((2, 3))
    g.inputs.append(onnx.helper.make_tensor_value_info("rows", TensorProto.INT64, (2,)))
    norm = g("LayerNormalization", "x", np.ones(3), np.zeros(3), axis=-1, outputs=3)
    model = to_float16(g.model(g("Gather", norm, "rows"), f"{norm}_1", f"{norm}_2"))
    found = {v.name: v.dtype for node in model.graph for v in node.outputs}
    assert found[norm] == ir.DataType.FLOAT16
    assert found[f"{norm}_1"] == found[f"{norm}_2"] == ir.DataType.FLOAT
    casts = [node.inputs[0].name for node in model.graph if node.op_type == "Cast"]
    assert len(casts) == 2  # the image, and the first output
    assert casts[0] == "x"
    onnx.checker.check_model(onnx.load_from_string(graphs.serialize(model)), full_check=True)


@pytest.mark.parametrize("output", [False, True])
def test_norms_of_squares_stay_in_32_bits(output: bool) -> None:
    """400² is beyond 16 bits, and so is the 1e-12 that keeps a quotient finite."""
    g = SmallGraph((2, 8))
    gamma = g.const(np.full(8, 1e-12), "gamma")
    norm = g("L2Normalization", g("Mul", "x", 1.0), domain="ptq_onnx", epsilon=1e-12)
    root = g("RMSNormalization", norm, gamma, domain="ptq_onnx", epsilon=1e-6)
    end = root if output else g("Mul", root, 2.0)
    before = g.model(end)
    for node in before.graph:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape([2, 8])
    x = np.stack([np.full(8, 400.0), np.zeros(8)]).astype(np.float32)
    model = to_float16(before)
    assert model.graph.initializers["gamma"].dtype == ir.DataType.FLOAT
    proto = onnx.load_from_string(graphs.serialize(model))
    onnx.checker.check_model(proto, full_check=True)
    found = run(model, x)[0]
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, run(before, x)[0], atol=1e-7)


@pytest.mark.parametrize("scales", [[2.0**-14, 3e-6, 1.0, 4.5e-5], 1.5e-6])
@pytest.mark.parametrize("op", ["MatMul", "Linear", "Conv"])
def test_small_weight_scales_grow_and_nothing_else_changes(
    op: str, scales: float | list[float]
) -> None:
    rng = np.random.default_rng(0)
    shape = (4, 3, 2, 2) if op == "Conv" else (3, 4)
    scale = np.array(scales, np.float32)
    g = SmallGraph((2, 3, 4, 4) if op == "Conv" else (2, 5, 3))
    weight = g(
        "DequantizeLinear",
        g.const(rng.integers(-127, 128, shape).astype(np.int8), "codes"),
        g.const(scale, "scale"),
        axis=0 if op == "Conv" else 1,
    )
    bias = [] if op == "MatMul" else [g.const(rng.normal(size=4), "bias")]
    domain = "ptq_onnx" if op == "Linear" else ""
    product = g(op, "x", weight, *bias, domain=domain)
    model = g.model(product)
    x = rng.normal(size=(2, 3, 4, 4) if op == "Conv" else (2, 5, 3)).astype(np.float32)
    expected = run(model, x)[0]
    halves = to_float16(model).graph.initializers["scale_enlarged"].const_value.numpy()
    assert enlarge_small_scales(model.graph) == 1
    grown = model.graph.initializers["scale_enlarged"].const_value.numpy()
    np.testing.assert_array_equal(halves, grown.astype(np.float16))
    assert grown.min() >= 2.0**-14
    assert (grown[scale < 2.0**-14] < 2.0**-13).all()
    np.testing.assert_array_equal(grown[scale >= 2.0**-14], scale[scale >= 2.0**-14])
    np.testing.assert_array_equal(run(model, x)[0], expected)
    assert enlarge_small_scales(model.graph) == 0
    assert [v.name for v in model.graph.outputs] == [product]


def test_channels_of_zeros_take_the_smallest_scale() -> None:
    g = SmallGraph((2, 3))
    codes = np.array([[1, 0, 3, 0]] * 3, np.int8)
    scale = g.const(np.array([0.5, 5e-29, 1e-5, 0.25]), "scale")
    weight = g("DequantizeLinear", g.const(codes, "codes"), scale, axis=1)
    model = g.model(g("MatMul", "x", weight))
    assert enlarge_small_scales(model.graph) == 1
    grown = model.graph.initializers["scale_enlarged"].const_value.numpy()
    np.testing.assert_array_equal(grown, np.float32([0.5, 2.0**-14, 8e-5, 0.25]))
    (mul,) = (node for node in model.graph if node.op_type == "Mul")
    np.testing.assert_array_equal(mul.inputs[1].const_value.numpy(), [1, 1, 0.125, 1])


def test_small_scales_that_cannot_grow_are_refused() -> None:
    """Those along another axis, those that need more than 2^14, and those of an activation."""
    for axis, number in ((0, 1e-5), (1, 1e-9)):
        g = SmallGraph((2, 4))
        scale = g.const(np.full(4, number), "scale")
        codes = g.const(np.ones((4, 4), np.int8), "codes")
        model = g.model(g("MatMul", "x", g("DequantizeLinear", codes, scale, axis=axis)))
        with pytest.raises(ModelError, match="'scale': expected at least 2"):
            to_float16(model)
    g = SmallGraph((2, 4))
    scale, zero = g.const(np.array(1e-5), "small"), g.const(np.int8(0), "zero")
    coded = g("QuantizeLinear", "x", scale, zero)
    with pytest.raises(ModelError, match="'small': expected at least 2\\^-14"):
        to_float16(g.model(g("DequantizeLinear", coded, scale, zero)))


@pytest.mark.parametrize("op", ["Linear", "Conv"])
def test_a_scale_in_front_of_a_computed_bias_stays(op: str) -> None:
    """The factor would have to go into the bias as well, which is no constant."""
    g = SmallGraph((2, 3, 2, 2) if op == "Conv" else (2, 3))
    codes = np.ones((4, 3, 2, 2) if op == "Conv" else (3, 4), np.int8)
    weight = g(
        "DequantizeLinear",
        g.const(codes, "codes"),
        g.const(np.full(4, 1e-5), "scale"),
        axis=0 if op == "Conv" else 1,
    )
    bias = g("Abs", g.const(np.arange(4.0), "b"))
    domain = "ptq_onnx" if op == "Linear" else ""
    model = g.model(g(op, "x", weight, bias, domain=domain))
    before = text(model)
    assert enlarge_small_scales(model.graph) == 0
    assert text(model) == before


def test_scaled_sums_stay_in_range_as_means() -> None:
    """1000 times 100 is beyond 65504, and 1e-8 below what 16 bits hold."""
    g = SmallGraph((2, 1000, 3))
    axes = g.const(np.array([-2], np.int64), "axes")
    model = g.model(g("Mul", g("ReduceSum", "x", axes, keepdims=1), g.const(np.array(1e-8), "by")))
    x = np.random.default_rng(0).normal(100, 1, size=(2, 1000, 3)).astype(np.float32)
    expected = run(model, x)[0]
    halves = to_float16(model)
    assert [n.op_type for n in halves.graph] == ["Cast", "ReduceMean", "Mul", "Cast"]
    np.testing.assert_allclose(run(halves, x)[0], expected, rtol=5e-3)
    assert sums_to_means(model.graph) == 1
    np.testing.assert_allclose(run(model, x)[0], expected, rtol=1e-5)
    assert run(model, x)[0].shape == (2, 1, 3)
    assert sums_to_means(model.graph) == 0


@pytest.mark.parametrize(
    "near", ["dynamic", "two readers", "computed", "output", "add", "all axes"]
)
def test_other_sums_stay(near: str) -> None:
    g = SmallGraph((2, "n" if near == "dynamic" else 5, 3))
    over = np.array([] if near == "all axes" else [1], np.int64)
    total = g("ReduceSum", "x", g.const(over, "axes"), keepdims=1)
    by = g("Sqrt", total) if near == "computed" else g.const(np.array(0.5), "by")
    end = g("Add" if near == "add" else "Mul", total, by)
    if near == "two readers":
        end = g("Add", end, total)
    model = g.model(*([end, total] if near == "output" else [end]))
    assert sums_to_means(model.graph) == 0


def test_powers_of_two() -> None:
    found = power_of_two(np.array([2.0**-14, 2.0**-15, 3e-5, 1.0, 0.0], np.float32))
    np.testing.assert_array_equal(found, [1, 2, 4, 1, 1])


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "integer"])
def test_other_targets_refuse_it(target: str) -> None:
    with pytest.raises(ConfigError, match="use --target tensorrt"):
        QuantizeConfig(target=target, float16=True)


@pytest.mark.parametrize(
    ("attributes", "kind"),
    [
        ({"value": numpy_helper.from_array(np.float32([1, 2]))}, "FLOAT16"),
        ({"value": numpy_helper.from_array(np.array([1, 2], np.int64))}, "INT64"),
        ({"value": numpy_helper.from_array(np.array([1, 2], np.float64))}, "DOUBLE"),
        ({"value_float": 1.5}, "FLOAT16"),
        ({"value_floats": [1.5, 2.5]}, "FLOAT16"),
        ({"value_int": 3}, "INT64"),
        ({"value_ints": [3, 4]}, "INT64"),
    ],
    ids=str,
)
def test_only_floats_that_nodes_hold_are_halved(attributes: dict[str, object], kind: str) -> None:
    """In 32 bits; whole numbers, and what has 64 bits, stay as they are."""
    g = SmallGraph((2, 2))
    held = g("Constant", **attributes)
    model = g.model(g("Cast", held, to=int(FLOAT)), g("Relu", "x"))
    found = to_float16(model)
    (node,) = [n for n in found.graph if n.op_type == "Constant"]
    given = node.attributes.get("value")
    if given is None:
        assert kind == "INT64"
        assert list(node.attributes) == list(attributes)
        return
    assert given.as_tensor().dtype.name == kind
    for one, other in zip(run(found, np.ones((2, 2), np.float32)),
                          run(model, np.ones((2, 2), np.float32)), strict=True):  # fmt: skip
        np.testing.assert_array_equal(one, other)
