"""Each rule about files for Qualcomm's NPU, broken once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from small_transformer import Choices, transformer

from npu.units import file_of, quantizer_for
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.targets.checking.check import check, explain
from ptq_onnx.targets.qnn.compiling import Compiler

COMPILED = {"compiles", "in-integers"}


@pytest.fixture(scope="module")
def conforming() -> ir.Model:
    return graphs.to_standard(file_of(quantizer_for(transformer(Choices()), "8/16/16"))[0])


@pytest.fixture(autouse=True)
def without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiler, "__call__", lambda *_: None)


def node(graph: ir.Graph, kind: str) -> ir.Node:
    return next(n for n in graph if n.op_type == kind)


def behind(graph: ir.Graph, kind: str) -> tuple[ir.Node, ir.Node]:
    """The Q and DQ behind the first op of a kind."""
    quantize = next(use.node for use in node(graph, kind).outputs[0].uses())
    return quantize, next(use.node for use in quantize.outputs[0].uses())


def renew(graph: ir.Graph, owner: ir.Node, index: int, array: np.ndarray) -> None:
    """A constant input of one node, anew."""
    name = f"new_{len(graph.initializers)}"
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    owner.replace_input_with(index, value)


def early_opset(graph: ir.Graph) -> None:
    graph.opset_imports[""] = 20


def dynamic_batch(graph: ir.Graph) -> None:
    graph.inputs[0].shape = ir.Shape(["batch", *list(graph.inputs[0].shape)[1:]])


def float_codes(graph: ir.Graph) -> None:
    for one in behind(graph, "Softmax"):
        renew(graph, one, 2, np.array(0, ir.DataType.FLOAT8E4M3FN.numpy()))


def other_zero_point(graph: ir.Graph) -> None:
    renew(graph, behind(graph, "Gelu")[1], 2, np.array(0, np.uint8))


def computed_scale(graph: ir.Graph) -> None:
    quantize = behind(graph, "Gelu")[0]
    made = ir.node("Abs", [quantize.inputs[1]], name="abs")
    made.outputs[0].name, made.outputs[0].dtype = "computed", ir.DataType.FLOAT
    graph.insert_before(quantize, made)
    quantize.replace_input_with(1, made.outputs[0])


def zero_scale(graph: ir.Graph) -> None:
    for one in behind(graph, "Gelu"):
        renew(graph, one, 1, np.array(0, np.float32))


def scale_per_channel(graph: ir.Graph) -> None:
    for one in behind(graph, "Gelu"):
        renew(graph, one, 1, np.full(32, 0.1, np.float32))
        renew(graph, one, 2, np.zeros(32, np.uint16))
        one.attributes["axis"] = ir.AttrInt64("axis", 2)


def inner_weight_axis(graph: ir.Graph) -> None:
    weight = node(graph, "MatMul").inputs[1].producer()
    size = weight.inputs[0].const_value.shape[0]
    renew(graph, weight, 1, np.full(size, 0.1, np.float32))
    renew(graph, weight, 2, np.zeros(size, np.int8))
    weight.attributes["axis"] = ir.AttrInt64("axis", 0)


def four_bits_for_all(graph: ir.Graph) -> None:
    weight = node(graph, "MatMul").inputs[1].producer()
    codes = weight.inputs[0].const_value.numpy()
    kind = ir.DataType.INT4.numpy()
    renew(graph, weight, 0, (codes // 32).astype(kind))
    renew(graph, weight, 1, np.array(0.1, np.float32))
    renew(graph, weight, 2, np.array(0, kind))


def float_between(graph: ir.Graph) -> None:
    quantize, dequantize = behind(graph, "Softmax")
    dequantize.outputs[0].replace_all_uses_with(quantize.inputs[0])


def two_types(graph: ir.Graph) -> None:
    for one in behind(graph, "Softmax"):
        renew(graph, one, 2, np.array(0, np.uint8))


def wide_gamma(graph: ir.Graph) -> None:
    gamma = node(graph, "LayerNormalization").inputs[1].producer()
    renew(graph, gamma, 0, gamma.inputs[0].const_value.numpy().astype(np.uint16))
    renew(graph, gamma, 2, np.array(0, np.uint16))


BREAKS: dict[str, Callable[[ir.Graph], None]] = {
    "opset-in-range": early_opset,
    "batch-fixed": dynamic_batch,
    "code-type": float_codes,
    "zero-point-type": other_zero_point,
    "scale-constant": computed_scale,
    "scale-positive": zero_scale,
    "activation-per-tensor": scale_per_channel,
    "weight-axis": inner_weight_axis,
    "four-bits-per-channel": four_bits_for_all,
    "whole-units": float_between,
    "one-type": two_types,
    "norm-constants": wide_gamma,
}


def test_a_file_of_ours_conforms(conforming: ir.Model) -> None:
    report = check(conforming.clone(), "qnn")
    assert report.violations == ()
    assert set(report.skipped) == COMPILED
    assert (report.quantized_linears, report.quantized_products) == (7, 2)


@pytest.mark.parametrize("rule", BREAKS)
def test_a_broken_rule_is_found(rule: str, conforming: ir.Model) -> None:
    model = conforming.clone()
    BREAKS[rule](model.graph)
    assert rule in {v.rule for v in check(model, "qnn").violations}


def test_every_rule_is_broken_once() -> None:
    assert set(BREAKS) | COMPILED == set(explain("qnn"))
