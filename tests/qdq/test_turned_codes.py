"""Second factors turned behind their codes, as OpenVINO likes it: what changes, and what stays."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run, sample

from ptq_onnx.blocks.walking import is_product
from ptq_onnx.config.targets import TARGETS
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.pipeline.quantize import QuantizeConfig, quantize
from ptq_onnx.preparation.model_files import load, to_standard
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.qdq.turned_codes import turn_behind_codes
from ptq_onnx.targets.checking.check import check

SIGNED = Rule(8, stored="int8")
ROOT = Path(__file__).parents[2]


def attention(*perms: list[int], shown: bool = False, twice: bool = False) -> ir.Model:
    """q kᵀ of two heads, whose k goes through Transposes of a tensor of heads."""
    g = SmallGraph(("batch", 4, 8), opset=20)
    heads = g("Reshape", g("MatMul", "x", sample(8, 8, seed=1)), np.array([0, 4, 2, 4]))
    q = g("Transpose", heads, perm=[0, 2, 1, 3])
    k = heads
    for perm in perms:
        k = g("Transpose", k, perm=perm)
    outputs = [g("MatMul", q, k)]
    if twice:  # k is a first factor too
        outputs.append(g("MatMul", k, q))
    model = g.model(*outputs, *([k] if shown else []))
    fuse(model)
    return model


def coded(model: ir.Model, *, turned: bool = True, axis: int | None = None) -> ir.Model:
    """Both factors in int8."""
    product = next(n for n in model.graph if is_product(n))
    names = [str(value.name) for value in product.inputs if value is not None]
    scale, point = np.array(0.1, np.float32), np.array(0, np.int32)
    specs = {n: TensorSpec(n, SIGNED, scale, point, clip=(-12.8, 12.7)) for n in names}
    lowered = lower(model, specs)
    return to_standard(turn_behind_codes(lowered) if turned else lowered)


def second_factor(model: ir.Model) -> list[tuple[str, list[int]]]:
    """The ops behind which a product's second factor stands, nearest to it first, with perm."""
    found = []
    value = next(n for n in model.graph if is_product(n)).inputs[1]
    while value is not None and (node := value.producer()) is not None and len(found) < 5:
        found.append((node.op_type, list(node.attributes.get_ints("perm", ()))))
        value = node.inputs[0]
    return found


PAIR = [("DequantizeLinear", []), ("QuantizeLinear", [])]
LAST, ROWS = ("Transpose", [0, 1, 3, 2]), ("Transpose", [0, 2, 1, 3])


@pytest.mark.parametrize(
    ("perms", "expected"),
    [
        ([[0, 2, 3, 1]], [LAST, *PAIR, ROWS]),
        ([[0, 2, 1, 3], [0, 1, 3, 2]], [LAST, *PAIR, ROWS]),
    ],
)
def test_the_last_axes_are_swapped_behind_the_codes(
    perms: list[list[int]], expected: list[tuple[str, list[int]]]
) -> None:
    before, after = (coded(attention(*perms), turned=turned) for turned in (False, True))
    assert second_factor(before)[:2] == PAIR
    assert second_factor(after)[: len(expected)] == expected
    x = sample(2, 4, 8, seed=3)
    np.testing.assert_array_equal(run(after, x)[0], run(before, x)[0])
    (codes,) = [n.outputs[0].name for n in after.graph if n.op_type == "QuantizeLinear"][1:]
    tensor = next(n for n in before.graph if is_product(n)).inputs[1].name  # type: ignore[union-attr]
    assert codes == str(tensor).replace("_dequantized", "_rows_quantized")
    sizes = {v.name: list(v.shape) for n in after.graph for v in n.outputs if v.shape is not None}
    product = next(n for n in after.graph if is_product(n))
    rows = [n for n in after.graph if n.op_type == "DequantizeLinear"][-1].outputs[0].name
    assert sizes[product.inputs[1].name][-2:] == [4, 4] == sizes[rows][-2:]  # type: ignore[union-attr]


def test_sizes_change_places_with_the_axes() -> None:
    """Of k [B, 2, 4, 3]ᵀ every value in between has the shape that it has at run time."""
    g = SmallGraph(("batch", 5, 6), opset=20)
    heads = g("Reshape", g("MatMul", "x", sample(6, 6, seed=1)), np.array([0, 5, 2, 3]))
    q = g("Transpose", heads, perm=[0, 2, 1, 3])
    model = g.model(g("MatMul", q, g("Transpose", heads, perm=[0, 2, 3, 1])))
    fuse(model)
    after = coded(model)
    shapes = {
        n.op_type + str(n.attributes.get_ints("perm", ())): [*n.outputs[0].shape][-2:]
        for n in after.graph
        if n.outputs[0].shape is not None
    }
    assert shapes["Transpose(0, 1, 3, 2)"] == [3, 5]
    assert shapes["DequantizeLinear()"] == shapes["QuantizeLinear()"] == [5, 3]
    assert run(after, sample(2, 5, 6, seed=3))[0].shape == (2, 2, 5, 5)


@pytest.mark.parametrize(
    "given",
    [
        {"perms": [[0, 2, 1, 3]]},  # rows stay rows
        {"perms": [[0, 3, 2, 1]]},  # columns come forward too
        {"perms": [[0, 2, 3, 1]], "shown": True},
        {"perms": [[0, 2, 3, 1]], "twice": True},
    ],
)
def test_other_factors_stay_as_they_are(given: dict[str, Any]) -> None:
    perms = given.pop("perms")
    before, after = (coded(attention(*perms, **given), turned=turned) for turned in (False, True))
    assert second_factor(after) == second_factor(before)


def test_only_files_for_openvino_have_them() -> None:
    assert [name for name, target in TARGETS.items() if target.turned_codes] == ["openvino"]


def test_a_file_for_openvino_has_its_k_turned_behind_the_codes(tmp_path: Path) -> None:
    """All blocks of the embedded model; every rule is obeyed."""
    config = QuantizeConfig(target="openvino", images=8, threads=1, report=False)
    digits = ROOT / "models/digits_vit.onnx"
    quantize(digits, config=config, output=tmp_path / "a", calib=ROOT / "img/digits/calib")
    model = load(tmp_path / "a/quantized.onnx")
    seconds = [n.inputs[1] for n in model.graph if is_product(n)]
    makers = [v.producer() for v in seconds if v is not None]
    turned = [n for n in makers if n is not None and n.op_type == "Transpose"]
    assert 2 * len(turned) == len([n for n in makers if n is not None and not is_constant(n)]) > 0
    for node in turned:
        assert node.attributes.get_ints("perm") == (0, 1, 3, 2)
        assert node.inputs[0].producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]
    assert check(tmp_path / "a/quantized.onnx", "openvino").violations == ()


def is_constant(node: ir.Node) -> bool:
    """True for what makes a weight of its codes."""
    return node.inputs[0] is not None and node.inputs[0].is_initializer()
