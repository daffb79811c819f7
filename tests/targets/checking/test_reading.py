"""What the rules read of a graph: axes, types of codes, weights, functions, kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import quantized_block as q
from onnx import helper
from quantized_block import Block, conforming

from ptq_onnx.targets.checking.check import check
from ptq_onnx.targets.checking.coding import Coding
from ptq_onnx.targets.checking.precisions import compiled
from ptq_onnx.targets.checking.product import Product, find_products, inner_axis, weight_axis
from ptq_onnx.targets.checking.quantized_model import open_model


def product(op: str, shape: tuple[int, ...], *, first: bool = False, **attributes: Any) -> Product:
    """One product of the graph input and a quantized weight."""
    block = Block()
    weight = block.weight("fc", shape, 0)
    block.add(op, "y", *((weight, "x") if first else ("x", weight)), **attributes)
    (found,) = find_products(ir.from_proto(block.proto()).graph)
    return found


@pytest.mark.parametrize(
    ("op", "shape", "attributes", "outputs", "inner"),
    [
        ("MatMul", (4, 6), {}, 1, 0),
        ("MatMul", (2, 4, 6), {}, 2, 1),
        ("MatMul", (4, 6), {"first": True}, 0, 1),
        ("Gemm", (4, 6), {}, 1, 0),
        ("Gemm", (4, 6), {"transB": 1}, 0, 1),
        ("Gemm", (4, 6), {"first": True}, 0, 1),
        ("Gemm", (4, 6), {"first": True, "transA": 1}, 1, 0),
        ("Conv", (4, 6, 3, 3), {}, 0, 1),
        ("ConvTranspose", (4, 6, 3, 3), {}, 1, 0),
    ],
)
def test_axes_of_a_weight(
    op: str, shape: tuple[int, ...], attributes: dict[str, Any], outputs: int, inner: int
) -> None:
    found = product(op, shape, **attributes)
    operand = next(o for o in found.operands if o.weight)
    assert (weight_axis(found, operand), inner_axis(found, operand)) == (outputs, inner)
    assert found.linear
    assert found.weight_only


def test_type_of_codes() -> None:
    block = Block()
    scale = block.const("scale", np.float32(1))
    block.add("QuantizeLinear", "plain", "x", scale)
    block.add("QuantizeLinear", "stated", "x", scale, output_dtype=onnx.TensorProto.INT8)
    block.add("QuantizeLinear", "pointed", "x", scale, block.const("zero", np.int16(0)))
    for name in ("plain", "stated", "pointed"):
        block.add("DequantizeLinear", f"{name}_dq", name, scale)
    graph = ir.from_proto(block.proto("plain_dq")).graph
    found = {Coding(node).name: Coding(node).dtype for node in graph}
    kinds = {"plain": "UINT8", "stated": "INT8", "pointed": "INT16"}
    assert found == {
        name + end: ir.DataType[kind] for name, kind in kinds.items() for end in ("", "_dq")
    }


def test_a_table_is_no_weight() -> None:
    block = Block()
    table = block.const("table", np.ones(8, np.float32))
    looked_up = block.add("Gather", "looked_up", table, block.add("Cast", "level", "x", to=7))
    block.add("MatMul", "y", looked_up, "x")
    (found,) = find_products(ir.from_proto(block.proto()).graph)
    assert not found.linear


def test_functions_are_seen_through(tmp_path: Path) -> None:
    """The value of attention in a function of the file."""
    block = conforming("tensorrt")
    q.float_value(block)
    node = block.node("av")
    model = block.proto()
    body = helper.make_node("MatMul", ["a", "b"], ["c"], "inner")
    opsets = [helper.make_opsetid("", block.opset)]
    model.functions.append(helper.make_function("local", "Mix", ["a", "b"], ["c"], [body], opsets))
    model.opset_import.append(helper.make_opsetid("local", 1))
    called = next(n for n in model.graph.node if n.name == node.name)
    called.op_type, called.domain = "Mix", "local"
    onnx.save(model, tmp_path / "f.onnx")
    (found,) = check(tmp_path / "f.onnx", "tensorrt").violations
    assert found.rule == "inputs-quantized"
    assert "inner" in found.node


def test_decompressed_weights_are_float_products(tmp_path: Path) -> None:
    """OpenVINO calls such a product i8 or u8: the type of its weight, not of its arithmetic."""
    pytest.importorskip("openvino")
    for edit in (q.float_activation, q.unsigned_weight, q.shifted_weight):
        block = conforming("openvino")
        edit(block)
        onnx.save(block.proto(), tmp_path / "block.onnx")
        floats = [p for p in compiled(tmp_path / "block.onnx") if p.precision == "f32"]
        assert len(floats) == 1
        assert {"fc2", "fc2_bias"} & set(floats[0].originals)


def test_sources(tmp_path: Path) -> None:
    """A file is loaded by its path, a model in memory from its bytes."""
    onnx.save(conforming("tensorrt").proto(), tmp_path / "block.onnx")
    assert open_model(tmp_path / "block.onnx").source == str(tmp_path / "block.onnx")
    assert isinstance(open_model(ir.load(tmp_path / "block.onnx")).source, bytes)
