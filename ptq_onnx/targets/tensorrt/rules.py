"""Rules of NVIDIA TensorRT for explicitly quantized ONNX files.

Sources: TensorRT documentation 11.x ("Working with Quantized Types": "Explicit Quantization"
and "Quantization Schemes"; "Fused Attention"; "ONNX Opset Guide"), and what the ONNX parser
(onnx-tensorrt) checks when it imports QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.walking import is_constant, name_of
from ptq_onnx.graph.codings import DEQUANTIZE, QUANTIZE
from ptq_onnx.targets.checking import common
from ptq_onnx.targets.checking.coding import (
    FOUR_BITS,
    FP8,
    INT8,
    Coding,
    back_through_moves,
    constant,
    type_of,
)
from ptq_onnx.targets.checking.fused_attention import (
    attention_head_size,
    attention_length,
    attention_output,
    before_scores,
    fp8_attention_order,
)
from ptq_onnx.targets.checking.product import INTEGER_PRODUCTS, inner_axis
from ptq_onnx.targets.checking.quantized_model import QuantizedModel
from ptq_onnx.targets.checking.result import Finding
from ptq_onnx.targets.checking.target import Target

NAME = "TensorRT"
OPSETS = 13, 25
"""From the axis attribute of Q/DQ to the maximum of the 11.x parser (10.x ends earlier)."""
CODES = (INT8, FP8, ir.DataType.INT4)
FIRST_OPSET = {FP8: 19, ir.DataType.INT4: 21}
BLOCK_SIZES = (64, 128)
SOFTMAX_SCALES = {INT8: 1 / 127, FP8: 1 / 448}
UNSUPPORTED = frozenset((*INTEGER_PRODUCTS, "DynamicQuantizeLinear"))


def opset_in_range(model: QuantizedModel) -> Iterator[Finding]:
    """The parser of TensorRT 11 reads opset 9 to 25, and the axis of Q/DQ exists from opset 13
    (ONNX Opset Guide; Explicit Quantization, "ONNX Support")."""
    yield from common.opset_outside(model, *OPSETS, NAME)


def standard_domain(model: QuantizedModel) -> Iterator[Finding]:
    """Ops of another domain need a plug-in of the user (operators.md of onnx-tensorrt)."""
    for node, text in common.foreign_ops(model, ("",), NAME):
        yield Finding(name_of(node), text)


def no_integer_ops(model: QuantizedModel) -> Iterator[Finding]:
    """QLinear… and …Integer ops are not imported; quantization is expressed by Q/DQ around float
    ops (operators.md of onnx-tensorrt; Explicit Quantization)."""
    for node in model.graph:
        if node.op_type in UNSUPPORTED and node.domain == "":
            yield Finding(
                name_of(node),
                f"expected Q/DQ around a float op, found {node.op_type}; write the file in "
                "QDQ format.",
            )


def code_type(model: QuantizedModel) -> Iterator[Finding]:
    """Codes are INT8, FP8 E4M3 or, for weights, INT4; UINT8 exists on DLA only (Quantization
    Schemes; the parser's check of the quantization type)."""
    for coding in common.other_codings(model, CODES):
        yield Finding(
            coding.name,
            f"expected int8, float8e4m3fn or int4 codes, found {common.dtype_name(coding)}; "
            "quantize symmetrically to int8 (without a zero point the type is uint8).",
        )


def bias_float(model: QuantizedModel) -> Iterator[Finding]:
    """DequantizeLinear of int32 is rejected ("only activation types allowed as input to this
    layer"); biases stay float (the parser's check of the quantization type)."""
    for coding in common.quantized_biases(model):
        yield Finding(
            coding.name,
            "expected a float bias, found int32 codes behind DequantizeLinear; store the bias "
            "in float.",
        )


def type_in_opset(model: QuantizedModel) -> Iterator[Finding]:
    """FP8 codes exist from opset 19, INT4 codes from opset 21 (Explicit Quantization, "ONNX
    Support")."""
    for coding in common.first_codings(model):
        first = FIRST_OPSET.get(coding.dtype, 0) if coding.dtype else 0
        if model.opset < first:
            yield Finding(
                coding.name,
                f"{common.dtype_name(coding)} codes need opset {first}, found {model.opset}; "
                "export with a later opset.",
            )


def zero_point_zero(model: QuantizedModel) -> Iterator[Finding]:
    """Quantization is symmetric: every zero point is 0 (Quantization Schemes; the parser rejects
    other zero points)."""
    for coding in common.first_codings(model):
        point = coding.zero_point
        if point is not None and point.any():
            yield Finding(
                coding.name,
                f"expected zero point 0, found {point[point != 0].flat[0]:g}; quantize "
                "symmetrically.",
            )


def zero_point_type(model: QuantizedModel) -> Iterator[Finding]:
    """A zero point has the type of the codes (ONNX operator specification, QuantizeLinear)."""
    yield from common.unlike_zero_points(model)


def scale_constant(model: QuantizedModel) -> Iterator[Finding]:
    """Scale and zero point are build-time constants (Explicit Quantization)."""
    yield from common.computed_parameters(model)


def scale_positive(model: QuantizedModel) -> Iterator[Finding]:
    """ "Scale coefficients must all be positive" (the parser's check of the scales)."""
    yield from common.bad_scales(model)


def pair_agrees(model: QuantizedModel) -> Iterator[Finding]:
    """Q and DQ of one pair share scale and zero point, else the pair cannot be fused into a
    quantized layer (Explicit Quantization)."""
    yield from common.unlike_pairs(model)


def activation_per_tensor(model: QuantizedModel) -> Iterator[Finding]:
    """Activations have one scale per tensor; scales per channel are for weights (Explicit
    Quantization)."""
    yield from common.once(common.per_axis_activations(model))


def weight_axis(model: QuantizedModel) -> Iterator[Finding]:
    """Scales per channel lie on the output channels: axis 0 of Conv and Gemm with transB, 1 of
    MatMul [K, N], Gemm and ConvTranspose (Explicit Quantization)."""
    yield from common.once(common.wrong_weight_axes(model))


def weight_blocks(model: QuantizedModel) -> Iterator[Finding]:
    """INT4 is for weights, in blocks of 64 or 128 along one of the last two axes (Quantization
    Schemes)."""
    for product, operand, coding in common.operands(model):
        if coding.dtype not in FOUR_BITS:
            continue
        size = coding.block_size
        if not operand.weight:
            text = "expected int8 or FP8 for an activation, found int4; INT4 is for weights"
        elif size not in BLOCK_SIZES:
            text = f"expected blocks of 64 or 128 for int4, found {size or 'none'}"
        elif coding.axis not in (inner_axis(product, operand), -2, -1):
            text = f"expected blocks along the axis of the sum, found axis {coding.axis}"
        else:
            continue
        yield Finding(coding.name, f"{text}; quantize the weight of '{product.name}' again.")


def inputs_quantized(model: QuantizedModel) -> Iterator[Finding]:
    """A product computes in INT8 or FP8 only with Q/DQ on all its inputs, both products of
    attention included; INT4 alone is weight-only (Explicit Quantization, placement of Q/DQ)."""
    for product in model.products:
        bare = any(o.dequantize is None for o in product.operands)
        if product.touched and bare and not (product.weight_only and product.four_bits):
            yield common.half_quantized(model, product)


def types_agree(model: QuantizedModel) -> Iterator[Finding]:
    """The inputs of one product are both INT8 or both FP8 (Explicit Quantization)."""
    for product in model.products:
        codes = [o.dequantize for o in product.operands if o.dequantize is not None]
        if {c.dtype for c in codes} == {INT8, FP8}:
            found = " and ".join(common.dtype_name(c) for c in codes)
            yield Finding(
                product.name, f"expected one type for both inputs, found {found}; use one of them."
            )


def one_pair_per_tensor(model: QuantizedModel) -> Iterator[Finding]:
    """A tensor that several layers read is quantized once, by one Q/DQ pair that all of them
    read (Explicit Quantization, placement of Q/DQ)."""
    seen: dict[ir.Value, list[Coding]] = defaultdict(list)
    for coding in model.codings:
        data = coding.node.inputs[0]
        if not coding.quantizes or data is None or is_constant(data):
            continue
        for other in seen[data]:
            mine, theirs = coding.scale, other.scale
            if mine is not None and theirs is not None and np.array_equal(mine, theirs):
                yield Finding(
                    coding.name,
                    f"expected one Q/DQ pair on '{data.name}', found another with the same scale "
                    f"('{other.name}'); let all readers share that one.",
                    "warning",
                )
                break
        seen[data].append(coding)


def attention_scale_first(model: QuantizedModel) -> Iterator[Finding]:
    """Q or K is multiplied by the attention scale before the first product, else attention does
    not fuse (Fused Attention, note)."""
    for node in model.graph:
        if node.op_type != "Softmax" or node.inputs[0] is None:
            continue
        passed: list[ir.Node] = []
        before = before_scores(node.inputs[0], passed)
        scalings = [n for n in passed if n.op_type in ("Mul", "Div") and _scalar(n)]
        if before is not None and before.op_type == "MatMul":
            for scaling in scalings:
                yield Finding(
                    name_of(scaling),
                    f"expected the scale of QKᵀ before the product '{name_of(before)}', found "
                    f"{scaling.op_type} behind it; multiply q by it, or fold it into q's weight.",
                    "warning",
                )


def softmax_scale(model: QuantizedModel) -> Iterator[Finding]:
    """The output of softmax lies in [0, 1]: its scale is 1/448 in FP8, which NVIDIA's Model
    Optimizer writes for attention to fuse, and at most 1/127 in INT8, beyond which codes stand
    for nothing (Model Optimizer, FP8 exporter)."""
    for coding in model.codings:
        data = coding.node.inputs[0]
        largest = SOFTMAX_SCALES.get(coding.dtype) if coding.dtype else None
        if not coding.quantizes or data is None or coding.scale is None or largest is None:
            continue
        node = back_through_moves(data)[0].producer()
        if node is not None and node.op_type == "Softmax":
            found, exact = coding.scale.flat[0], coding.dtype == FP8
            if abs(found / largest - 1) > 1e-3 if exact else found / largest - 1 > 1e-3:
                yield Finding(
                    coding.name,
                    f"expected scale {'' if exact else 'at most '}1/{1 / largest:.0f} on the output"
                    f" of Softmax '{name_of(node)}', found {found:.6g}; use that.",
                    "warning",
                )


def residual_branch(model: QuantizedModel) -> Iterator[Finding]:
    """A residual add takes Q/DQ on its skip input, not on the product's output: a pair there keeps
    product and add from fusing (Explicit Quantization, placement of Q/DQ; Figure "suboptimal
    fusion")."""
    products = {product.node for product in model.products}
    for node in model.graph:
        if node.op_type != "Add" or any(is_constant(v) for v in node.inputs):
            continue
        for value in node.inputs:
            pair = None if value is None else value.producer()
            codes = None if pair is None or pair.op_type != DEQUANTIZE else pair.inputs[0]
            quantize = None if codes is None else codes.producer()
            if quantize is None or quantize.op_type != QUANTIZE:
                continue
            made = _before_bias(quantize.inputs[0])
            if made in products:
                yield Finding(
                    name_of(quantize),
                    f"expected the output of '{name_of(made)}' in float at the add "
                    f"'{name_of(node)}', found Q/DQ; quantize its other input.",
                    "warning",
                )


def scale_type(model: QuantizedModel) -> Iterator[Finding]:
    """The type of the scale is that of the floats around it, so that it is the same for Q and DQ
    of a pair; a network is strongly typed (Explicit Quantization; ONNX, QuantizeLinear-19)."""
    for coding in model.codings:
        codes = coding.node.inputs[0]
        before = None if codes is None else back_through_moves(codes)[0].producer()
        if coding.quantizes or before is None or before.op_type != QUANTIZE:
            continue
        mine, other = (n.inputs[1] for n in (coding.node, before))
        if mine is None or other is None or type_of(mine) == type_of(other):
            continue
        yield Finding(
            coding.name,
            f"expected the type of the scale of '{name_of(before)}', {_lower(type_of(other))}, "
            f"found {_lower(type_of(mine))}; store both in one type.",
        )


def saturating(model: QuantizedModel) -> Iterator[Finding]:
    """FP8 codes saturate: TensorRT has no other conversion (ONNX, QuantizeLinear, saturate)."""
    for coding in model.codings:
        if coding.dtype == FP8 and not coding.node.attributes.get_int("saturate", 1):
            yield Finding(coding.name, "expected saturate 1, found 0; leave the attribute out.")


def stray_pair(model: QuantizedModel) -> Iterator[Finding]:
    """Q/DQ around ops without a quantized kernel (LayerNorm, the input of softmax, GELU) only
    adds conversions; residual adds may have them (Explicit Quantization, placement of Q/DQ)."""
    yield from common.stray_pairs(model)


def float_product(model: QuantizedModel) -> Iterator[Finding]:
    """A layer without Q/DQ runs in the precision of its tensors (Explicit Quantization)."""
    yield from common.float_products(model)


def _before_bias(value: ir.Value | None) -> ir.Node | None:
    """What makes a value, before the Add of a constant."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Add" and any(is_constant(v) for v in node.inputs):
        data = next((v for v in node.inputs if not is_constant(v)), None)
        node = None if data is None else data.producer()
    return node


def _lower(dtype: ir.DataType | None) -> str:
    return "unknown" if dtype is None else dtype.name.lower()


def _scalar(node: ir.Node) -> bool:
    """One input is a constant with one element."""
    arrays = (constant(value) for value in node.inputs)
    return any(array is not None and array.size == 1 for array in arrays)


TARGET = Target(
    rules=(
        opset_in_range,
        standard_domain,
        no_integer_ops,
        code_type,
        bias_float,
        type_in_opset,
        zero_point_zero,
        zero_point_type,
        scale_constant,
        scale_positive,
        pair_agrees,
        activation_per_tensor,
        weight_axis,
        weight_blocks,
        inputs_quantized,
        types_agree,
        one_pair_per_tensor,
        attention_scale_first,
        attention_output,
        attention_head_size,
        attention_length,
        fp8_attention_order,
        softmax_scale,
        residual_branch,
        scale_type,
        saturating,
        stray_pair,
        float_product,
    )
)
