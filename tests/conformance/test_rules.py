"""A conforming file has no violations; each broken one is named by its rule and node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest
import quantized_block as q
from quantized_block import Block, conforming

from ptq_onnx.conformance import TARGETS, Report, check, explain

Break = Callable[[Block], None]


class Case(NamedTuple):
    """What breaks a conforming block, and the rule and the node that must be named."""

    target: str
    rule: str
    node: str
    broken: Break
    severity: str = "error"


WARNING = "warning"
T, O, V = "tensorrt", "onnxruntime", "openvino"
CASES = (
    Case(T, "opset-in-range", "", q.later_opset),
    Case(T, "standard-domain", "gelu", q.foreign_op),
    Case(T, "no-integer-ops", "integer", q.integer_matmul),
    Case(T, "code-type", "norm_q", q.unsigned_codes),
    Case(T, "bias-float", "bias_dq", q.coded_bias),
    Case(T, "zero-point-zero", "norm_q", q.shifted),
    Case(T, "zero-point-type", "norm_dq", q.other_zero_point_type),
    Case(T, "scale-constant", "norm_q", q.computed_scale),
    Case(T, "scale-positive", "norm_q", q.zero_scale),
    Case(T, "scale-positive", "fc2_w_dq", q.infinite_scale),
    Case(T, "pair-agrees", "norm_dq", q.two_scales),
    Case(T, "activation-per-tensor", "o_dq", q.scale_per_channel),
    Case(T, "weight-axis", "fc2_w_dq", q.inner_weight_axis),
    Case(T, "weight-blocks", "fc2_w_dq", q.small_blocks),
    Case(T, "inputs-quantized", "fc2", q.float_activation),
    Case(T, "inputs-quantized", "fc2", q.float_weight),
    Case(T, "inputs-quantized", "av", q.float_value),
    Case(T, "types-agree", "fc2", q.mixed_types),
    Case(T, "one-pair-per-tensor", "again_q", q.second_pair, WARNING),
    Case(T, "attention-scale-first", "scaled", q.late_attention_scale, WARNING),
    Case(T, "softmax-scale", "p_q", q.calibrated_softmax, WARNING),
    Case(T, "stray-pair", "stray_dq", q.pair_before_gelu, WARNING),
    Case(T, "float-product", "fc2", q.float_linear, WARNING),
    Case(O, "opset-in-range", "", q.later_opset),
    Case(O, "known-domain", "gelu", q.foreign_op),
    Case(O, "code-type", "norm_q", q.wide_codes),
    Case(O, "zero-point-type", "norm_dq", q.other_zero_point_type),
    Case(O, "scale-constant", "norm_q", q.computed_scale),
    Case(O, "scale-positive", "norm_q", q.zero_scale),
    Case(O, "pair-agrees", "norm_dq", q.two_scales),
    Case(O, "activation-per-tensor", "o_dq", q.scale_per_channel),
    Case(O, "activation-per-tensor", "branch_dq", q.scale_per_channel_of_add),
    Case(O, "weight-axis", "fc2_w_dq", q.inner_weight_axis),
    Case(O, "weight-blocks", "fc2_w_dq", q.blocks_along_outputs),
    Case(O, "inputs-quantized", "fc2", q.float_activation, WARNING),
    Case(O, "inputs-quantized", "fc2", q.float_weight),
    Case(O, "inputs-quantized", "av", q.float_value),
    Case(O, "activation-unsigned", "o_dq", q.signed_activation, WARNING),
    Case(O, "weight-signed", "fc2_w_dq", q.unsigned_weight, WARNING),
    Case(O, "conv-output", "conv", q.bare_conv),
    Case(O, "gemm-bias", "gemm", q.float_gemm_bias),
    Case(O, "stray-pair", "stray_dq", q.pair_before_gelu, WARNING),
    Case(O, "whole-gelu", "erf", q.erf_gelu, WARNING),
    Case(O, "whole-layer-norm", "root", q.open_layer_norm, WARNING),
    Case(O, "float-product", "fc2", q.float_linear, WARNING),
    Case(O, "loads", "", q.wrong_shape),
    Case(O, "products-in-integers", "fc2", q.flat_linear),
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
    Case(V, "attention-symmetric", "v_dq", q.positive_value),
    Case(V, "attention-symmetric", "q_dq", q.shifted_query),
    Case(V, "inputs-quantized", "fc2", q.float_activation),
    Case(V, "stray-pair", "stray_dq", q.pair_before_gelu, WARNING),
    Case(V, "float-product", "fc2", q.float_linear, WARNING),
)


def run(block: Block, target: str, folder: Path) -> Report:
    path = folder / "block.onnx"
    onnx.save(block.proto(), path)
    return check(path, target)


@pytest.mark.parametrize("target", TARGETS)
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
        (case.rule, case.node, case.severity)
    }
    assert report.conforms == (case.severity == WARNING)
