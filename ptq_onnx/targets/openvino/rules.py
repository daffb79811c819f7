"""Rules of OpenVINO for ONNX files with Q/DQ.

Sources: OpenVINO documentation, "Low Precision Transformations" and "OpenVINO Runtime: CPU
device"; what release 2026.4 makes of files, measured; and the compiled graph of the file itself,
which has the last word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from ptq_onnx.blocks.walking import name_of
from ptq_onnx.targets.checking import common
from ptq_onnx.targets.checking.coding import FOUR_BITS, INT8, UINT8
from ptq_onnx.targets.checking.precisions import CompiledGraph, CompiledProduct, compile_graph
from ptq_onnx.targets.checking.product import Product
from ptq_onnx.targets.checking.quantized_model import QuantizedModel
from ptq_onnx.targets.checking.result import Finding, Skipped
from ptq_onnx.targets.checking.target import Rule, Target

NAME = "OpenVINO"
OPSETS = 13, 28
"""From the axis attribute of Q/DQ to the last opset that 2026.4 compiles to int8 (measured)."""
CODES = (INT8, UINT8, *FOUR_BITS)


def opset_in_range(model: QuantizedModel) -> Iterator[Finding]:
    """Scales per channel need opset 13; 2026.4 was seen to read opset 28 (measured)."""
    yield from common.opset_outside(model, *OPSETS, NAME)


def code_type(model: QuantizedModel) -> Iterator[Finding]:
    """Low-precision products multiply int8 or uint8 codes; int4 is for weights (Low Precision
    Transformations, "Input model requirements")."""
    for coding in common.other_codings(model, CODES):
        yield Finding(
            coding.name,
            f"expected uint8 or int8 codes, found {common.dtype_name(coding)}; quantize to 8 bits.",
        )


def bias_float(model: QuantizedModel) -> Iterator[Finding]:
    """A bias stays float: OpenVINO adds it behind the integer product, and int32 codes only cost
    a conversion (Low Precision Transformations; measured)."""
    for coding in common.quantized_biases(model):
        yield Finding(
            coding.name,
            "expected a float bias, found int32 codes behind DequantizeLinear; store the bias "
            "in float.",
            "warning",
        )


def zero_point_type(model: QuantizedModel) -> Iterator[Finding]:
    """A zero point has the type of the codes (ONNX operator specification, DequantizeLinear)."""
    yield from common.unlike_zero_points(model)


def scale_constant(model: QuantizedModel) -> Iterator[Finding]:
    """Q/DQ becomes FakeQuantize only with constant scales and zero points (Low Precision
    Transformations; measured)."""
    yield from common.computed_parameters(model)


def scale_positive(model: QuantizedModel) -> Iterator[Finding]:
    """Scales are positive numbers (ONNX operator specification, QuantizeLinear)."""
    yield from common.bad_scales(model)


def pair_agrees(model: QuantizedModel) -> Iterator[Finding]:
    """Q and DQ of one pair share scale and zero point: both become one FakeQuantize (Low
    Precision Transformations)."""
    yield from common.unlike_pairs(model)


def activation_per_tensor(model: QuantizedModel) -> Iterator[Finding]:
    """What a product reads has one scale; the CPU plug-in does not even compile scales along the
    last axis (Low Precision Transformations, "Input model requirements"; measured)."""
    yield from common.once(common.per_axis_activations(model))


def weight_axis(model: QuantizedModel) -> Iterator[Finding]:
    """Scales per channel lie on the output channels, else the weight is decompressed and the
    product runs in float (Low Precision Transformations; measured)."""
    yield from common.once(common.wrong_weight_axes(model))


def weight_symmetric(model: QuantizedModel) -> Iterator[Finding]:
    """Weights are int8 with zero point 0: with another one the product runs in float (Low
    Precision Transformations; measured)."""
    for product, _, coding in common.weights(model):
        point = coding.zero_point
        if coding.dtype == INT8 and point is not None and point.any():
            yield Finding(
                coding.name,
                f"expected zero point 0 for the weight of '{product.name}', found "
                f"{point[point != 0].flat[0]:g}; quantize weights symmetrically.",
            )
        elif coding.dtype == UINT8:
            yield Finding(
                coding.name,
                f"expected int8 codes for the weight of '{product.name}', found uint8; quantize "
                "weights symmetrically to int8.",
            )


def no_integer_ops(model: QuantizedModel) -> Iterator[Finding]:
    """MatMulInteger and ConvInteger are imported as products of floats (measured, 2026.4)."""
    for node in model.graph:
        if node.op_type in ("MatMulInteger", "ConvInteger"):
            yield Finding(
                name_of(node),
                f"expected Q/DQ around a float op, found {node.op_type}; write the file in "
                "QDQ format.",
            )


def attention_symmetric(model: QuantizedModel) -> Iterator[Finding]:
    """A product of two activations runs in int8 only with zero point 0 on the first (int8, or
    uint8 as behind softmax) and symmetric codes on the second: int8 with zero point 0 or uint8
    with 128 (measured, 2026.4)."""
    for product in model.products:
        if product.linear or not product.quantized:
            continue
        for operand in product.operands:
            coding = operand.dequantize
            if coding is None or coding.zero_point is None or coding.dtype is None:
                continue
            expected = 128 if operand.index == 1 and coding.dtype == UINT8 else 0
            found = coding.zero_point.flat[0]
            if found != expected:
                yield Finding(
                    coding.name,
                    f"expected {common.dtype_name(coding)} codes with zero point {expected} on "
                    f"input {operand.index} of '{product.name}', found {found:g}: the product "
                    "runs in float; quantize symmetrically.",
                )


def inputs_quantized(model: QuantizedModel) -> Iterator[Finding]:
    """All inputs of a product are quantized, else it runs in float; a 4-bit weight may stand
    alone (Low Precision Transformations, "Input model requirements")."""
    for product in model.products:
        bare = any(o.dequantize is None for o in product.operands)
        if product.touched and bare and not (product.weight_only and product.four_bits):
            yield common.half_quantized(model, product)


def stray_pair(model: QuantizedModel) -> Iterator[Finding]:
    """A pair that no low-precision op reads stays as FakeQuantize and costs time (Low Precision
    Transformations)."""
    yield from common.stray_pairs(model)


def float_product(model: QuantizedModel) -> Iterator[Finding]:
    """A product without Q/DQ runs in float (Low Precision Transformations)."""
    yield from common.float_products(model)


def compiles(model: QuantizedModel) -> Iterator[Finding]:
    """OpenVINO compiles the file for the CPU."""
    refusal = _compiled(model).refusal
    if refusal and not _explained(model):
        yield Finding("", f"{refusal} Find the op it names, or export again.")


def runtime_precision(model: QuantizedModel) -> Iterator[Finding]:
    """In the compiled graph every product that has Q/DQ in the file runs in i8 or u8
    (runtimePrecision of this very file's products, inference precision f32)."""
    explained = _explained(model)
    for compiled in _compiled(model).products:
        product = _product_of(compiled, model)
        if product is None:
            continue
        if not product.quantized or compiled.precision in ("i8", "u8"):
            continue
        if not explained & common.names(product):
            yield Finding(
                product.name,
                f"expected {compiled.op_type} in i8 or u8, found {compiled.precision}; put Q/DQ "
                "with one scale directly on both inputs.",
            )


def _product_of(compiled: CompiledProduct, model: QuantizedModel) -> Product | None:
    """The product of the file: by its own name, or by that of a scale or bias merged into it."""
    own = {name: p for p in model.products for name in (p.name, p.node.outputs[0].name)}
    for name in compiled.originals:
        if name in own:
            return own[name]
    nodes = {name: n for n in model.graph for name in (name_of(n), n.outputs[0].name)}
    for name in compiled.originals:
        if name in nodes and nodes[name].op_type in common.FUSED:
            product = common.product_behind(nodes[name].outputs[0], model, common.FUSED)
            if product is not None:
                return product
    return None


def _compiled(model: QuantizedModel) -> CompiledGraph:
    """Raises Skipped."""
    found = model.derived(compile_graph)
    if found is None:
        raise Skipped("openvino is not installed: pip install 'ptq-onnx[openvino]'.")
    return found


def _explained(model: QuantizedModel) -> set[str]:
    """Nodes of which a rule about the file says already why they do not run in int8."""
    return {f.node for rule in STATIC for f in rule(model) if f.severity == "error"}


def _facts(model: QuantizedModel) -> Mapping[str, Mapping[str, int]]:
    found = model.derived(compile_graph)
    if found is None:
        return {}
    kinds = (f"{p.op_type} {p.precision}" for p in found.products)
    return {"compiled": dict(Counter(kinds).most_common())}


STATIC: tuple[Rule, ...] = (
    opset_in_range,
    code_type,
    bias_float,
    zero_point_type,
    scale_constant,
    scale_positive,
    pair_agrees,
    activation_per_tensor,
    weight_axis,
    weight_symmetric,
    no_integer_ops,
    attention_symmetric,
    inputs_quantized,
    stray_pair,
    float_product,
)
"""Rules about the file as it is written."""

TARGET = Target(rules=(*STATIC, compiles, runtime_precision), facts=_facts)
