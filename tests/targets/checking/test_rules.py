"""A conforming file has no violations; each broken one is named by its rule and node."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx_ir as ir
import pytest
import quantized_block as q
from quantized_block import Block, conforming

from ptq_onnx.errors import ConfigError
from ptq_onnx.targets.checking.check import TARGETS, Report, check, explain
from ptq_onnx.targets.checking.optimised import optimised_histogram
from ptq_onnx.targets.checking.precisions import CompiledGraph, CompiledProduct
from ptq_onnx.targets.openvino import rules as openvino

Break = Callable[[Block], None]


class Case(NamedTuple):
    """What breaks a conforming block, and the rule and the nodes that must be named."""

    target: str
    rule: str
    node: str
    broken: Break
    severity: str = "error"


WARNING = "warning"
QDQ = tuple(t for t in TARGETS if t not in ("integer", "qnn"))
"""Targets whose files hold Q/DQ pairs around products; files of ``integer``, and of ``qnn``, which
have them around every op, have tests of their own (``tests/npu``)."""
T, R, V = "tensorrt", "onnxruntime", "openvino"
CASES = (
    Case(T, "opset-in-range", "", q.later_opset),
    Case(T, "standard-domain", "gelu", q.foreign_op),
    Case(T, "no-integer-ops", "integer", q.integer_matmul),
    Case(T, "code-type", "norm_q", q.unsigned_codes),
    Case(T, "bias-float", "bias_dq", q.coded_bias),
    Case(T, "type-in-opset", "gelu_q fc2_w_dq", q.early_fp8),
    Case(T, "zero-point-zero", "norm_q", q.shifted),
    Case(T, "zero-point-type", "norm_dq", q.other_zero_point_type),
    Case(T, "scale-constant", "norm_q", q.computed_scale),
    Case(T, "scale-positive", "norm_q", q.zero_scale),
    Case(T, "scale-positive", "fc2_w_dq", q.infinite_scale),
    Case(T, "pair-agrees", "norm_dq", q.two_scales),
    Case(T, "activation-per-tensor", "o_dq", q.scale_per_channel),
    Case(T, "weight-axis", "fc2_w_dq", q.inner_weight_axis),
    Case(T, "weight-blocks", "fc2_w_dq", q.small_blocks),
    Case(T, "inputs-quantized", "q", q.float_weight_beside, WARNING),
    Case(T, "inputs-quantized", "fc2", q.float_activation),
    Case(T, "inputs-quantized", "fc2", q.float_weight),
    Case(T, "inputs-quantized", "av", q.float_value),
    Case(T, "types-agree", "fc2", q.mixed_types),
    Case(T, "one-pair-per-tensor", "again_q", q.second_pair, WARNING),
    Case(T, "attention-scale-first", "scaled", q.late_attention_scale, WARNING),
    Case(T, "attention-output", "av", q.mean_restored, WARNING),
    Case(T, "attention-head-size", "qk", q.narrow_heads, WARNING),
    Case(T, "attention-length", "qk", q.many_tokens, WARNING),
    Case(T, "fp8-attention-order", "kt", q.late_transpose, WARNING),
    Case(T, "softmax-scale", "p_q", q.wide_softmax, WARNING),
    Case(T, "softmax-scale", "p_q", q.calibrated_fp8_softmax, WARNING),
    Case(T, "residual-branch", "branch_q", q.branch_pair, WARNING),
    Case(T, "scale-type", "norm_dq", q.half_scale),
    Case(T, "saturating", "norm_q", q.wrapping_fp8),
    Case(T, "stray-pair", "stray_dq", q.pair_before_gelu, WARNING),
    Case(T, "float-product", "fc2", q.float_linear, WARNING),
    Case(R, "opset-in-range", "", q.later_opset),
    Case(R, "known-domain", "gelu", q.foreign_op),
    Case(R, "code-type", "norm_q", q.wide_codes),
    Case(R, "zero-point-type", "norm_dq", q.other_zero_point_type),
    Case(R, "scale-constant", "norm_q", q.computed_scale),
    Case(R, "scale-positive", "norm_q", q.zero_scale),
    Case(R, "pair-agrees", "norm_dq", q.two_scales),
    Case(R, "activation-per-tensor", "o_dq", q.scale_per_channel),
    Case(R, "activation-per-tensor", "branch_dq", q.scale_per_channel_of_add),
    Case(R, "weight-axis", "fc2_w_dq", q.inner_weight_axis),
    Case(R, "weight-blocks", "fc2_w_dq", q.blocks_along_outputs),
    Case(R, "inputs-quantized", "q", q.float_weight_beside, WARNING),
    Case(R, "inputs-quantized", "fc2", q.float_activation, WARNING),
    Case(R, "inputs-quantized", "fc2", q.float_weight),
    Case(R, "inputs-quantized", "av", q.float_value),
    Case(R, "inputs-quantized", "av", q.other_table),
    Case(R, "inputs-quantized", "av", q.wide_table_index),
    Case(R, "inputs-quantized", "av", q.one_level),
    Case(R, "table-codes", "av", q.log2_map, WARNING),
    Case(R, "float-product", "av", q.log2_map_of_floats, WARNING),
    Case(R, "activation-unsigned", "o_dq", q.signed_activation, WARNING),
    Case(R, "weight-signed", "fc2_w_dq", q.unsigned_weight, WARNING),
    Case(R, "conv-output", "conv", q.bare_conv),
    Case(R, "gemm-bias", "gemm", q.float_gemm_bias),
    Case(R, "output-float", "stray_q", q.pair_between_floats, WARNING),
    Case(R, "stray-pair", "stray_dq", q.pair_before_gelu, WARNING),
    Case(R, "whole-gelu", "erf", q.erf_gelu, WARNING),
    Case(R, "whole-layer-norm", "root", q.open_layer_norm, WARNING),
    Case(R, "float-product", "fc2", q.float_linear, WARNING),
    Case(R, "loads", "", q.wrong_shape),
    Case(R, "products-in-integers", "fc2", q.flat_linear),
    Case(V, "opset-in-range", "", q.later_opset),
    Case(V, "code-type", "norm_q", q.wide_codes),
    Case(V, "bias-float", "bias_dq", q.coded_bias, WARNING),
    Case(V, "zero-point-type", "norm_dq", q.other_zero_point_type),
    Case(V, "scale-constant", "norm_q", q.computed_scale),
    Case(V, "scale-positive", "norm_q", q.zero_scale),
    Case(V, "pair-agrees", "norm_dq", q.two_scales),
    Case(V, "activation-per-tensor", "o_dq", q.scale_per_channel),
    Case(V, "weight-axis", "fc2_w_dq", q.inner_weight_axis),
    Case(V, "weight-symmetric", "fc2_w_dq", q.shifted_weight),
    Case(V, "weight-symmetric", "fc2_w_dq", q.unsigned_weight),
    Case(V, "no-integer-ops", "integer", q.integer_matmul),
    Case(V, "attention-symmetric", "v_dq", q.positive_value),
    Case(V, "attention-symmetric", "q_dq", q.shifted_query),
    Case(V, "inputs-quantized", "q", q.float_weight_beside, WARNING),
    Case(V, "inputs-quantized", "fc2", q.float_activation),
    Case(V, "stray-pair", "stray_dq", q.pair_before_gelu, WARNING),
    Case(V, "float-product", "fc2", q.float_linear, WARNING),
)


def run(block: Block, target: str, folder: Path) -> Report:
    path = folder / "block.onnx"
    onnx.save(block.proto(), path)
    return check(path, target)


@pytest.mark.parametrize("target", QDQ)
def test_conforming_block(target: str, tmp_path: Path) -> None:
    report = run(conforming(target), target, tmp_path)
    assert report.violations == ()
    assert report.conforms
    assert (report.linears, report.quantized_linears) == (5, 5)
    assert (report.products, report.quantized_products) == (2, 2)
    assert report.ops["MatMul"] == 7


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.target}-{c.rule}-{c.broken.__name__}")
def test_broken_block(case: Case, tmp_path: Path) -> None:
    block = conforming(case.target)
    case.broken(block)
    report = run(block, case.target, tmp_path)
    assert {(v.rule, v.node, v.severity) for v in report.violations} == {
        (case.rule, node, case.severity) for node in case.node.split(" ")
    }
    assert report.conforms == (case.severity == WARNING)


NEAR_MISSES = (
    (T, q.all_fp8),
    (T, q.large_blocks),
    (T, q.calibrated_softmax),
    (T, q.moved_output),
    (T, q.late_int8_transpose),
    (T, q.most_tokens),
    (R, q.small_blocks),
    (R, q.conv_with_output),
    (R, q.wide_residual),
    (R, q.moved_signed_factor),
    (V, q.large_blocks),
    (V, q.signed_activation),
    (V, q.middle_value),
    *(
        (t, edit)
        for t in QDQ
        for edit in (
            q.residual_pair,
            q.one_weight_scale,
            q.transposed_weight,
            q.masked,
            q.quantized_in_graph,
        )
    ),
)


@pytest.mark.parametrize(("target", "edit"), NEAR_MISSES)
def test_what_looks_like_a_violation_and_is_none(target: str, edit: Break, tmp_path: Path) -> None:
    block = conforming(target)
    edit(block)
    assert run(block, target, tmp_path).violations == ()


def test_openvino_compiles_the_file(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    block = conforming(V)
    assert run(block, V, tmp_path).facts == {
        "compiled": {"FullyConnected u8": 5, "MatMul u8": 1, "MatMul i8": 1}
    }
    q.wrong_shape(block)
    found = run(block, V, tmp_path).violations
    assert [(v.rule, v.node, v.severity) for v in found] == [("compiles", "", "error")]


def test_runtime_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What OpenVINO runs in float is named by the node of the file."""
    products = (
        CompiledProduct("FullyConnected", "f32", ("fc2", "fc2_bias")),
        CompiledProduct("FullyConnected", "u8", ("proj",)),
        CompiledProduct("MatMul", "f32", ("of no product",)),
    )
    monkeypatch.setattr(openvino, "compile_graph", lambda _: CompiledGraph(products))
    report = run(conforming(V), V, tmp_path)
    assert [(v.rule, v.node) for v in report.violations] == [("runtime-precision", "fc2")]


def test_without_openvino(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    report = run(conforming(V), V, tmp_path)
    assert report.conforms
    assert set(report.skipped) == {"compiles", "runtime-precision"}
    assert "pip install 'ptq-onnx[openvino]'" in report.skipped["compiles"]


@pytest.mark.parametrize("target", QDQ)
def test_every_rule_is_broken_once(target: str) -> None:
    elsewhere = {"compiles", "runtime-precision"} if target == V else set()
    assert {case.rule for case in CASES if case.target == target} | elsewhere == set(
        explain(target)
    )


@pytest.mark.parametrize("target", TARGETS)
def test_every_rule_states_its_source(target: str) -> None:
    for name, text in explain(target).items():
        assert "(" in text or name in ("loads", "compiles"), name
        assert text.endswith("."), name


def test_optimised_histogram(tmp_path: Path) -> None:
    path = tmp_path / "block.onnx"
    onnx.save(conforming(R).proto(), path)
    found = optimised_histogram(path)
    assert (found["MatMulIntegerToFloat"], found["QLinearMatMul"]) == (6, 1)
    assert not {"MatMul", "Gemm", "FusedMatMul", "DequantizeLinear"} & set(found)
    facts = check(path, R).facts
    assert facts["optimised"] == found
    assert facts["without VNNI"] == {"may saturate": 0, "never": 5}


def test_model_in_memory() -> None:
    report = check(ir.from_proto(conforming(R).proto()), R)
    assert report.violations == ()
    assert report.facts["optimised"]["MatMulIntegerToFloat"] == 6


def test_unknown_target() -> None:
    with pytest.raises(ConfigError, match="expected one of tensorrt, onnxruntime, openvino"):
        check("any.onnx", "coreml")
