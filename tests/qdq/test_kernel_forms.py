"""The forms that ONNX Runtime's kernels are fastest with: what changes, on the same numbers."""

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from prepared_models import DIGITS, ROOT, images, quantized
from small_graph import SmallGraph, run, sample

from ptq_onnx.blocks.walking import is_product
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.targets import TARGETS
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.preparation.model_files import serialize, to_standard
from ptq_onnx.qdq.kernel_forms import suit_kernels
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.targets.checking.check import check

OPTIONS: dict[str, dict[str, Any]] = {
    "deploy": {"quantizer": "deploy"},
    "dynamic": {"quantizer": "deploy", "activations": "dynamic-token"},
    "vanilla": {"quantizer": "vanilla"},
    "channelwise": {"quantizer": "channelwise"},
    "fqvit": {},
    "fqvit 4/4/4": {"bits": "4/4/4"},
}


@cache
def forms(name: str) -> tuple[ir.Model, ir.Model]:
    """The file of the embedded model as lowering writes it, and as the kernels like it."""
    quantizer = quantized(**OPTIONS[name])
    return tuple(  # type: ignore[return-value]
        to_standard(suited)
        for suited in (
            lower(quantizer.model, quantizer.specs),
            suit_kernels(lower(quantizer.model, quantizer.specs)),
        )
    )


def optimised(model: ir.Model, path: Path) -> Counter[str]:
    """Ops of the graph that ONNX Runtime makes of it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path / "optimised.onnx")
    ort.InferenceSession(serialize(model), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(path / "optimised.onnx").graph.node)


def constant(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def factors(model: ir.Model) -> list[str]:
    """The types of the codes of second factors, of every product of activations."""
    found = []
    for node in model.graph:
        second = node.inputs[1].producer() if is_product(node) and node.inputs[1] else None
        codes = None if second is None else second.inputs[0]
        if codes is not None and codes.dtype is not None and not codes.is_initializer():
            found.append(codes.dtype.name)
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_the_numbers_are_the_same_to_the_bit(name: str) -> None:
    before, after = forms(name)
    for one, other in zip(run(after, images()[:4]), run(before, images()[:4]), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", OPTIONS)
def test_no_size_between_input_and_output_has_a_name(name: str) -> None:
    for value in (v for node in forms(name)[1].graph for v in node.outputs):
        if value.shape is not None and not value.is_graph_output():
            assert all(isinstance(d, int) or d.value is None for d in value.shape), value.name
    for value in (*forms(name)[1].graph.inputs, *forms(name)[1].graph.outputs):
        assert value.shape is not None
        assert str(value.shape[0]) == "batch"


def test_second_factors_are_int8_and_stay_so_when_optimised(tmp_path: Path) -> None:
    """k and v of all blocks; the products are fused, and none is left on floats."""
    before, after = forms("deploy")
    blocks = len(factors(before)) // 2
    assert factors(before) == ["UINT8"] * 2 * blocks
    assert factors(after) == ["INT8"] * 2 * blocks
    plain, suited = optimised(before, tmp_path), optimised(after, tmp_path)
    assert suited["MatMulIntegerToFloat"] == plain["MatMulIntegerToFloat"] > 6 * blocks
    assert suited["MatMul"] == suited["QLinearMatMul"] == suited["DequantizeLinear"] == 0
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "types.onnx")
    session = ort.InferenceSession(serialize(after), options, providers=["CPUExecutionProvider"])
    assert session.get_inputs()
    graph = onnx.load(tmp_path / "types.onnx").graph
    zeros = {i.name: i.data_type for i in graph.initializer}
    made = {o for n in graph.node for o in n.output}
    kinds = [
        zeros[n.input[5]]
        for n in graph.node
        if n.op_type == "MatMulIntegerToFloat" and n.input[1] in made
    ]
    assert kinds == [onnx.TensorProto.INT8] * 2 * blocks


def test_a_bias_in_front_of_gelu_is_an_add_of_its_own(tmp_path: Path) -> None:
    before, after = forms("deploy")
    plain, suited = optimised(before, tmp_path), optimised(after, tmp_path)
    assert plain["BiasGelu"] == suited["Gelu"] > 0
    assert suited["BiasGelu"] == plain["Gelu"] == 0


# --- what stays -------------------------------------------------------------------------------


def attention(*, bias: bool = True, cut: bool = False, shown: bool = False) -> ir.Model:
    """x (a linear of x)ᵀ, fused: of all its columns, or of half of them."""
    g = SmallGraph(("batch", 4, 8))
    k = g("MatMul", "x", sample(8, 16 if cut else 8, seed=1))
    if bias:
        k = g("Add", k, sample(16 if cut else 8, seed=2))
    if cut:
        k = g("Split", k, np.array([8, 8]), axis=2, outputs=2)
    turned = g("Transpose", k, perm=[0, 2, 1])
    model = g.model(g("MatMul", "x", turned), *([turned] if shown else []))
    fuse(model)
    return model


def coded(model: ir.Model, rule: Rule, zero: int, *, suited: bool = True) -> ir.Model:
    """Both factors in codes, in the kernels' forms or as lowering writes them."""
    product = next(n for n in model.graph if is_product(n))
    scale, point = np.array(0.1, np.float32), np.array(zero, np.int32)
    names = [str(value.name) for value in product.inputs if value is not None]
    specs = {name: TensorSpec(name, rule, scale, point, clip=(-9.0, 9.0)) for name in names}
    lowered = lower(model, specs)
    return to_standard(suit_kernels(lowered) if suited else lowered)


UNSIGNED, SIGNED = Rule(8, signed=False, symmetric=False), Rule(8)


@pytest.mark.parametrize(
    ("given", "rule", "zero", "kind", "point"),
    [
        ({}, UNSIGNED, 100, "INT8", -28),
        ({}, SIGNED, 3, "INT8", 3),
        ({"bias": False}, UNSIGNED, 100, "UINT8", 100),  # Q would be the product's own
        ({"cut": True}, UNSIGNED, 100, "UINT8", 100),  # ONNX Runtime would move Q over the Split
        ({"shown": True}, UNSIGNED, 100, "UINT8", 100),
        ({}, Rule(6, signed=False, symmetric=False), 30, "UINT8", 30),  # behind a Clip
    ],
)
def test_only_what_is_moved_whole_is_int8(
    given: dict[str, bool], rule: Rule, zero: int, kind: str, point: int
) -> None:
    model = coded(attention(**given), rule, zero)
    assert factors(model) == [kind]
    product = next(n for n in model.graph if is_product(n))
    second = product.inputs[1]
    dequantize = None if second is None else second.producer()
    assert dequantize is not None
    assert int(constant(dequantize.inputs[2])) == point
    x = sample(2, 4, 8, seed=3)
    plain = coded(attention(**given), rule, zero, suited=False)
    for one, other in zip(run(model, x), run(plain, x), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("approximate", "rank"), [("none", 2), ("tanh", 1)])
def test_only_the_exact_gelu_has_its_bias_apart(approximate: str, rank: int) -> None:
    """The other is faster as ONNX Runtime fuses it."""
    g = SmallGraph(("batch", 4, 8))
    linear = g("Add", g("MatMul", "x", sample(8, 8, seed=1)), sample(8, seed=2))
    model = g.model(g("Gelu", linear, approximate=approximate))
    before = run(model, sample(2, 4, 8, seed=3))[0]
    fuse(model)
    suited = to_standard(suit_kernels(model))
    (add,) = [n for n in suited.graph if n.op_type == "Add"]
    bias = add.inputs[1]
    assert constant(bias).ndim == rank
    np.testing.assert_array_equal(run(suited, sample(2, 4, 8, seed=3))[0], before)


# --- in a run -----------------------------------------------------------------------------------


def test_only_files_for_onnxruntime_have_them() -> None:
    assert [name for name, target in TARGETS.items() if target.kernel_forms] == ["onnxruntime"]


def test_the_report_has_the_types_of_the_file(tmp_path: Path) -> None:
    """And a quantizer that reads it has its own again."""
    config = QuantizeConfig(quantizer="deploy", images=8, threads=1, report=False)
    calib = ROOT / "img/digits/calib"
    report = quantize(DIGITS, config=config, output=tmp_path / "a", calib=calib).report
    activations = [t for t in report["tensors"] if not t["parameter"]]
    types = {(t["role"], t["stored"]) for t in activations}
    assert {kind for role, kind in types if role in ("k", "v")} == {"int8"}
    assert {kind for role, kind in types if role not in ("k", "v")} == {"uint8"}
    for read in (TensorSpec.from_json(t["tensor"], t) for t in activations):
        assert read.rule.stored == "uint8" or read.rule.signed
    assert not check(tmp_path / "a/quantized.onnx", "onnxruntime").violations
