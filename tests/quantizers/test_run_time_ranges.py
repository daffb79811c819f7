"""Ranges found at run time: their numbers, the file that computes them, runs without images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from short_digits import short_digits
from small_graph import SmallGraph, run, sample

import ptq_onnx
from ptq_onnx.errors import ConfigError
from ptq_onnx.numerics.around.run_time import (
    ColumnMaximum,
    RunTimeRange,
    SkewedToken,
    TokenMaximum,
)
from ptq_onnx.numerics.fake_quantize import clipped, fake_quantize
from ptq_onnx.numerics.scales_file import read_scales
from ptq_onnx.numerics.spec import Rule, Site, TensorSpec
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.solved_specs import tensor_spec
from ptq_onnx.targets.checking.check import check
from ptq_onnx.targets.checking.optimised import optimised_histogram

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "img/digits/val"
QUICK: dict[str, Any] = {"threads": 1, "pictures": False, "images": 16}
WAYS = ("dynamic", "dynamic-token")
RNG = np.random.default_rng(11)


def whole(tensor: str = "x") -> TensorSpec:
    rule = Rule(8, False, False, method="fixed", around=(RunTimeRange(),))
    return TensorSpec(tensor, rule, np.float32(1 / 255), np.int32(0))


def vectors(around: TokenMaximum, tensor: str = "x") -> TensorSpec:
    rule = Rule(8, method="fixed", around=(around,))
    return TensorSpec(tensor, rule, np.float32(1 / 127), np.int32(0))


def skewed(tensor: str = "x") -> TensorSpec:
    rule = Rule(8, False, False, method="fixed", around=(SkewedToken(),))
    return TensorSpec(tensor, rule, np.float32(1 / 223), np.int32(32))


def by_the_standard(x: np.ndarray) -> np.ndarray:
    """DynamicQuantizeLinear and DequantizeLinear in ONNX Runtime."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, 1, list(x.shape)) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    return run(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), x
    )[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1e-4, 1.0, 300.0]), st.sampled_from([-2, 0, 2]))
def test_a_tensor_as_the_standard_has_it(seed: int, size: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    x = (size * (rng.normal(size=(3, 5)) + shift)).astype(np.float32)
    np.testing.assert_allclose(
        fake_quantize(x, whole()), by_the_standard(x), rtol=1e-5, atol=1e-6 * size
    )
    assert not clipped(x, whole()).any()


@pytest.mark.parametrize("x", [np.zeros((2, 4)), np.full((2, 4), 3.0), np.full((2, 4), -1e30)])
@pytest.mark.parametrize(
    "spec", [whole(), vectors(TokenMaximum()), vectors(ColumnMaximum()), skewed()]
)
def test_odd_tensors_stay_finite(spec: TensorSpec, x: np.ndarray) -> None:
    x = x.astype(np.float32)
    np.testing.assert_allclose(fake_quantize(x, spec), x, rtol=1e-5)


def test_a_massive_token_harms_only_itself() -> None:
    """Half a step of its own vector at most; over the whole tensor all others lose everything."""
    x = RNG.normal(size=(2, 6, 8)).astype(np.float32)
    x[0, 2] *= 1000
    for around, axis in ((TokenMaximum(), -1), (ColumnMaximum(), -2)):
        found = fake_quantize(x, vectors(around))
        bound = np.abs(x).max(axis=axis, keepdims=True) / 127 / 2
        assert (np.abs(found - x) <= bound * 1.001).all()
        again = fake_quantize(found, vectors(around))
        np.testing.assert_allclose(again, found, rtol=1e-5, atol=1e-7)
    others = np.arange(6) != 2
    rows = fake_quantize(x, vectors(TokenMaximum()))[0, others]
    alone = x.copy()
    alone[0, 2] /= 1000
    np.testing.assert_array_equal(rows, fake_quantize(alone, vectors(TokenMaximum()))[0, others])
    assert np.abs(fake_quantize(x, whole())[0, others]).max() < np.abs(x[0, 2]).max() / 100


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.01, 1.0, 300.0]))
def test_tokens_that_reach_up_have_nearly_twice_the_codes(seed: int, size: float) -> None:
    """Half of 1/223 of the largest value, of 223/32 of the least where that is more; zero is exact,
    and a second time changes nothing."""
    rng = np.random.default_rng(seed)
    x = (size * np.maximum(rng.normal(size=(2, 6, 16)), -0.17)).astype(np.float32)
    x[0, 0], x[0, 1, 3], x[1, 2] = 0, 1000 * size, -np.abs(x[1, 2])
    found = fake_quantize(x, skewed())
    top = np.maximum(x.max(axis=-1, keepdims=True), -223 / 32 * x.min(axis=-1, keepdims=True))
    assert (np.abs(found - x) <= top / 223 / 2 * 1.001).all()
    assert (found[x == 0] == 0).all()
    again = fake_quantize(found, skewed())
    np.testing.assert_allclose(again, found, rtol=1e-5, atol=float(top.max()) * 1e-6)


def test_the_file_computes_skewed_codes() -> None:
    """The least and the largest of each token, no magnitudes."""
    x = np.maximum(sample(2, 6, 8), np.float32(-0.1))
    g = SmallGraph((2, 6, 8))
    read = g("Identity", "x")
    made = g("Linear", read, sample(8, 5, seed=1), sample(5, seed=2), domain="ptq_onnx")
    lowered = graphs.to_standard(lower(g.model(made), {read: skewed(read)}))
    ops = Counter(node.op_type for node in lowered.graph)
    assert (ops["ReduceMax"], ops["ReduceMin"], ops["Abs"], ops["QuantizeLinear"]) == (1, 1, 0, 1)
    wanted = fake_quantize(x, skewed()) @ sample(8, 5, seed=1) + sample(5, seed=2)
    np.testing.assert_allclose(run(lowered, x)[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_every_width_has_an_eighth_below_zero(bits: int) -> None:
    rule = Rule(bits, False, False, method="fixed", around=(SkewedToken(),))
    site = Site("x", "fc2", 0, (1,), (2, 3), "n", ("m",))
    spec = tensor_spec(site, rule, SkewedToken.least(1 << bits), 1.0)
    zero = {2: 0, 3: 1, 4: 2, 6: 8, 8: 32}[bits]
    assert int(spec.zero_point) == zero
    assert float(spec.scale) == pytest.approx(1 / ((1 << bits) - 1 - zero))
    x = np.array([[0, 0.4, 1, SkewedToken.least(1 << bits)]], np.float32)
    assert (np.abs(fake_quantize(x, spec) - x) <= spec.scale / 2 * 1.001).all()
    assert TensorSpec.from_json("x", spec.to_json()).rule == rule


def test_steps_come_back_before_the_bias() -> None:
    """x̂ W + b of a fused linear, k and v by columns, and a reader that is no product."""
    x = sample(2, 4, 6)
    g = SmallGraph((2, 4, 6))
    read = g("Identity", "x")
    made = g("Linear", read, sample(6, 5, seed=1), sample(5, seed=2), domain="ptq_onnx")
    turned = g("Transpose", "x", perm=[0, 2, 1])
    other = g("Identity", turned)
    product = g("MatMul", "x", other)
    model = g.model(made, product)
    specs = {read: vectors(TokenMaximum(), read), other: vectors(ColumnMaximum(), other)}
    lowered = graphs.to_standard(lower(model, specs))
    ops = Counter(node.op_type for node in lowered.graph)
    assert (ops["ReduceMax"], ops["QuantizeLinear"], ops["MatMul"]) == (2, 2, 2)
    found = run(lowered, x)
    rounded = fake_quantize(x, vectors(TokenMaximum()))
    np.testing.assert_allclose(
        found[0], rounded @ sample(6, 5, seed=1) + sample(5, seed=2), rtol=1e-4, atol=1e-4
    )
    columns = fake_quantize(np.ascontiguousarray(x.transpose(0, 2, 1)), vectors(ColumnMaximum()))
    np.testing.assert_allclose(found[1], x @ columns, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of the digits' model; it has no images of its own."""
    folder = tmp_path_factory.mktemp("run_time")
    short_digits(folder / "m.onnx")
    for way in WAYS:
        ptq_onnx.quantize(
            folder / "m.onnx", calib=ROOT / "img/digits/calib",
            val=sorted(PICTURES.glob("*.png"))[:16], output=folder / way,
            activations=way, analysis_images=8, **QUICK,
        )  # fmt: skip
    return folder


def images(count: int) -> np.ndarray:
    return np.stack(
        list(
            ptq_onnx.open_images(
                PICTURES, ptq_onnx.Preprocess.named("inception", 32), count
            ).batches(count)
        )
    )[0]


def outputs(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("way", WAYS)
def test_every_product_is_computed_in_integers(place: Path, way: str) -> None:
    """No rule of the checker is broken; what ONNX Runtime makes of it has the fused kernels."""
    file = place / way / "quantized.onnx"
    assert check(file, "onnxruntime").errors == ()
    ops = optimised_histogram(file)
    linears = ops.get("DynamicQuantizeMatMul", 0) + ops["MatMulIntegerToFloat"]
    assert linears == 6 + 2 + 2
    assert not {"MatMul", "MatMulNBits", "Gemm", "FusedMatMul"} & ops.keys()
    assert (ops.get("DynamicQuantizeMatMul", 0) > 0) == (way == "dynamic")
    held = read_scales(place / way / "report.json")
    around = {type(a) for s in held.values() for a in s.rule.around}
    wanted = {RunTimeRange} if way == "dynamic" else {TokenMaximum, SkewedToken, ColumnMaximum}
    assert wanted <= around
    assert RunTimeRange in wanted or RunTimeRange not in around


@pytest.mark.parametrize("way", WAYS)
def test_a_range_that_is_known_stays(place: Path, way: str) -> None:
    """Pictures of 8 bits are coded in whole pixels, without an error, whatever finds the rest."""
    import json

    report = json.loads((place / way / "report.json").read_text())
    first = [t for t in report["tensors"] if t["role"] == "input"]
    assert [t["granularity"] for t in first] == ["tensor"]
    varied = {t["tensor"]: t for t in report["analysis"]["variation"]["tensors"]}
    error = varied[first[0]["tensor"]]["snr"]
    assert error < 1e-9


@pytest.mark.parametrize("way", WAYS)
def test_the_simulation_is_that_of_the_file(place: Path, way: str) -> None:
    """The logits' SQNR of file and simulation, on the same images, agree."""
    import json

    report = json.loads((place / way / "report.json").read_text())
    file, real = place / way / "quantized.onnx", place / way / "fused.onnx"
    x = images(8)
    float_ = outputs(real, x)
    own = 10 * np.log10(np.sum(float_**2) / np.sum((float_ - outputs(file, x)) ** 2))
    assert report["analysis"]["logits"]["snr_db"] == pytest.approx(own, abs=3)
    assert own > 25


def test_an_image_is_quantized_as_it_would_be_alone(place: Path) -> None:
    """By token whatever is in the batch, but for the order of sums; per tensor it is not."""
    x = images(8)
    x[1:] *= 3
    for way, alone in (("dynamic-token", True), ("dynamic", False)):
        file = place / way / "quantized.onnx"
        together, single = outputs(file, x)[0], outputs(file, x[:1])[0]
        assert np.allclose(together, single, rtol=1e-2, atol=1e-2 * np.abs(single).max()) == alone


@pytest.mark.parametrize("way", WAYS)
def test_no_images_are_needed(place: Path, way: str) -> None:
    found = ptq_onnx.quantize(
        place / "m.onnx", output=place / f"none_{way}", activations=way, report=False, **QUICK
    )
    assert (found.report["calibration"]["source"], found.report["calibration"]["images"]) == (
        "none",
        0,
    )
    assert found.report["fidelity"]["source"] == "noise"
    assert found.report["notes"][0].startswith("Ranges are found at run time, and no images were")
    x = images(8)
    real, file = outputs(place / "m.onnx", x), outputs(found.output / "quantized.onnx", x)
    assert 10 * np.log10(np.sum(real**2) / np.sum((real - file) ** 2)) > 25
    with pytest.raises(ConfigError, match="needs calibration images"):
        ptq_onnx.quantize(place / "m.onnx", output=place / "no")
    with pytest.raises(ConfigError, match="--rounding gptq needs calibration images"):
        ptq_onnx.quantize(
            place / "m.onnx", output=place / "no", activations=way, rounding="gptq", **QUICK
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "openvino"}, "its files hold calibrated ranges"),
        ({"quantizer": "vanilla"}, "use --quantizer deploy"),
        ({"weights": 4}, "leaves activations in float"),
        ({"method": "mse"}, "leave it out"),
        ({"bits": "8/6/8"}, "activations have 8 bits"),
        ({"more_bits": "fc2=16"}, "8 bits at most"),
        ({"per_channel": "all"}, "leave it out"),
    ],
)
def test_what_does_not_go_with_it(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"--activations dynamic with .*{words}"):
        ptq_onnx.QuantizeConfig(activations="dynamic", **options)


def test_a_codes_maker_without_constants_is_named_for_other_targets(place: Path) -> None:
    model = onnx.load(place / "dynamic/quantized.onnx")
    assert any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node)
    found = check(place / "dynamic/quantized.onnx", "openvino")
    assert any("computed at run time" in f.text for f in found.errors)
