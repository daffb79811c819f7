"""Rules of ONNX Runtime's CPU provider for QDQ files.

Sources: ONNX Runtime documentation, "Quantize ONNX Models"; what its optimizer (1.31) makes of
files, measured; and the optimised graph of the file itself, which has the last word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ptq_onnx.blocks.region_ops import KERNELS
from ptq_onnx.blocks.walking import consumers, name_of, through_layout
from ptq_onnx.targets.checking import common
from ptq_onnx.targets.checking.coding import (
    FOUR_BITS,
    INT8,
    INT32,
    SIXTEEN_BITS,
    UINT8,
    Coding,
    back_through_moves,
    constant,
)
from ptq_onnx.targets.checking.optimised import OptimisedNode, optimise
from ptq_onnx.targets.checking.product import Product, inner_axis
from ptq_onnx.targets.checking.quantized_model import QuantizedModel
from ptq_onnx.targets.checking.result import Finding
from ptq_onnx.targets.checking.target import Rule, Target
from ptq_onnx.targets.onnxruntime.saturation import TITLE, saturation

NAME = "ONNX Runtime"
OPSETS = 13, 26
"""From the axis attribute of Q/DQ to the last opset that 1.31 loads and fuses (measured)."""
CODES = (INT8, UINT8, *FOUR_BITS)
DOMAINS = ("", "com.microsoft", "com.ms.internal.nhwc", "com.microsoft.nchwc", "ai.onnx.ml")


def opset_in_range(model: QuantizedModel) -> Iterator[Finding]:
    """Scales per channel need opset 13, and ONNX Runtime 1.31 loads opset 26 at most (Quantize
    ONNX Models; measured)."""
    yield from common.opset_outside(model, *OPSETS, NAME)


def known_domain(model: QuantizedModel) -> Iterator[Finding]:
    """Ops are standard or of ONNX Runtime's own domains; others need a library of the user
    (ONNX Runtime documentation, "Custom operators")."""
    for node, text in common.foreign_ops(model, DOMAINS, NAME):
        yield Finding(name_of(node), text)


def code_type(model: QuantizedModel) -> Iterator[Finding]:
    """The integer kernels multiply 8-bit codes; 4-bit codes are for weights, int32 for biases, and
    16-bit codes for what no product reads (Quantize ONNX Models, "Data type selection")."""
    read = {
        operand.quantize.name
        for product in model.products
        for operand in product.operands
        if operand.quantize is not None
    }
    for coding in common.other_codings(model, CODES):
        if coding.dtype in SIXTEEN_BITS and coding.quantizes and coding.name not in read:
            continue
        yield Finding(
            coding.name,
            f"expected uint8 or int8 codes, found {common.dtype_name(coding)}; the CPU "
            "provider has no product for these: quantize to 8 bits.",
        )


def zero_point_type(model: QuantizedModel) -> Iterator[Finding]:
    """A zero point has the type of the codes, else the file is not loaded (ONNX operator
    specification, DequantizeLinear)."""
    yield from common.unlike_zero_points(model)


def scale_constant(model: QuantizedModel) -> Iterator[Finding]:
    """Static quantization stores scales and zero points as initializers (Quantize ONNX Models,
    "Static quantization"); those of DynamicQuantizeLinear are found at run time (the same,
    "Dynamic quantization")."""
    yield from common.computed_parameters(model, dynamic=True)


def scale_positive(model: QuantizedModel) -> Iterator[Finding]:
    """Scales are positive numbers (ONNX operator specification, QuantizeLinear)."""
    yield from common.bad_scales(model)


def pair_agrees(model: QuantizedModel) -> Iterator[Finding]:
    """Q and DQ of one pair share scale and zero point; fusion drops one of them (Quantize ONNX
    Models, "QDQ format")."""
    yield from common.unlike_pairs(model)


def activation_per_tensor(model: QuantizedModel) -> Iterator[Finding]:
    """What a product or an Add reads has one scale: the fused kernels take scalars, and per-axis
    Q/DQ fails at load (Add) or at run time (MatMul) (measured, 1.31)."""
    yield from common.once(common.per_axis_activations(model))
    for coding in model.codings:
        if coding.quantizes or coding.per_tensor or constant(coding.node.inputs[0]) is not None:
            continue
        for node, _ in consumers(coding.node.outputs[0]):
            if node.op_type == "Add":
                yield Finding(
                    coding.name,
                    f"expected one scale for the input of Add '{name_of(node)}', found scales on "
                    f"axis {coding.axis}; multiply by the factors outside the Q/DQ pair.",
                )


def weight_axis(model: QuantizedModel) -> Iterator[Finding]:
    """Scales per channel lie on the output channels (axis 1 of MatMul [K, N]); another axis fails
    at run time (Quantize ONNX Models, "Per-channel"; measured)."""
    yield from common.once(common.wrong_weight_axes(model))


def weight_blocks(model: QuantizedModel) -> Iterator[Finding]:
    """A 4-bit weight becomes MatMulNBits if its blocks run along the axis of the sum (0 of
    [K, N]) and the activation is float (Quantize ONNX Models, "Quantize to Int4/UInt4";
    measured)."""
    for product, operand, coding in common.operands(model):
        if coding.dtype not in FOUR_BITS:
            continue
        inner = inner_axis(product, operand)
        if not operand.weight:
            text = "4 bits are for weights: quantize the activation to uint8"
        elif not product.weight_only:
            text = (
                "expected a float activation beside a 4-bit weight, found Q/DQ, and the product "
                "runs in float; remove the pair"
            )
        elif coding.block_size and inner is not None and coding.axis not in (inner, -2):
            text = f"expected blocks along axis {inner}, found axis {coding.axis}; quantize again"
        else:
            continue
        yield Finding(coding.name, f"{text} ('{product.name}').")


def inputs_quantized(model: QuantizedModel) -> Iterator[Finding]:
    """A product is fused to an integer kernel only with Q/DQ on both inputs; a weight alone runs
    as MatMulNBits, in float arithmetic (Quantize ONNX Models; measured)."""
    nodes = model.derived(optimise).nodes
    narrow = {node.name for node in nodes if node.op_type == "MatMulNBits"}
    for product in model.products:
        if not product.touched or all(o.dequantize is not None for o in product.operands):
            continue
        if product.table or (product.weight_only and product.four_bits):
            continue
        found = common.half_quantized(model, product, KERNELS)
        only_weight = product.weight_only and product.name in narrow
        yield replace(found, severity="warning") if only_weight else found


def table_codes(model: QuantizedModel) -> Iterator[Finding]:
    """Codes whose values come from a table (log2) have no integer kernel, and the product is
    computed in float (the CPU provider's list of kernels; measured, 1.31)."""
    for product in model.products:
        if product.table:
            yield Finding(
                product.name,
                f"{product.table.name} codes: no int8 kernel, computed in float; where speed "
                f"counts, {product.table.instead}.",
                "warning",
            )


def activation_unsigned(model: QuantizedModel) -> Iterator[Finding]:
    """uint8 activations are the fast case on x86-64, but for a second factor that ops move between
    Q and DQ: there int8 is; other int8 ones are rewritten where the optimizer can (Quantize ONNX
    Models, "Data type selection"; measured, 1.31)."""
    for product, operand, coding in common.activations(model):
        data = coding.node.inputs[0]
        moved = data is not None and bool(back_through_moves(data)[1])
        if coding.dtype == INT8 and not (moved and operand.index == 1):
            yield Finding(
                coding.name,
                f"expected uint8 codes for the input of '{product.name}', found int8; use uint8, "
                "zero point 128 for a symmetric range.",
                "warning",
            )


def weight_signed(model: QuantizedModel) -> Iterator[Finding]:
    """int8 weights are the fast case on x86-64 with VNNI: U8S8 before U8U8 (Quantize ONNX Models,
    "Data type selection")."""
    for product, _, coding in common.weights(model):
        if coding.dtype == UINT8:
            yield Finding(
                coding.name,
                f"expected int8 codes for the weight of '{product.name}', found uint8; quantize "
                "symmetrically to int8.",
                "warning",
            )


def conv_output(model: QuantizedModel) -> Iterator[Finding]:
    """A Conv with Q/DQ on its inputs and no Q on its output stays float: only QLinearConv exists
    (measured, 1.31)."""
    for product in model.products:
        convolution = product.node.op_type in ("Conv", "ConvTranspose")
        if convolution and product.quantized and not common.output_quantized(product.node):
            yield Finding(
                product.name,
                f"expected a QuantizeLinear on the output of {product.node.op_type}, found "
                "none: it runs in float; write a patch embedding as reshape + MatMul.",
            )


def gemm_bias(model: QuantizedModel) -> Iterator[Finding]:
    """A Gemm with Q/DQ on its inputs is fused if its bias is int32 codes, or its output is
    quantized, or it has no bias (measured, 1.31)."""
    for product in model.products:
        node = product.node
        if not product.quantized or node.op_type != "Gemm" or len(node.inputs) < 3:
            continue
        bias = node.inputs[2]
        producer = None if bias is None else bias.producer()
        coded = producer is not None and Coding(producer).dtype == INT32
        if bias is not None and not coded and not common.output_quantized(product.node):
            yield Finding(
                product.name,
                "expected an int32 bias behind DequantizeLinear, found a float bias: the Gemm "
                "runs in float; write it as MatMul + Add.",
            )


def output_float(model: QuantizedModel) -> Iterator[Finding]:
    """Q stands on the inputs of products only: a pair on the output of a MatMul that no product
    reads gives QLinearMatMul (1.7 times the speed of float, not 2.3; measured)."""
    for coding in model.codings:
        data = coding.node.inputs[0]
        before = None if data is None else back_through_moves(data)[0].producer()
        if not coding.quantizes or before is None or before.op_type != "MatMul":
            continue
        pairs = [n for n, _ in through_layout(coding.node.outputs[0])]
        readers = [n for p in pairs for n, _ in through_layout(p.outputs[0])]
        if not any(n.op_type in ("MatMul", "Gemm", "Conv") for n in readers):
            yield Finding(
                coding.name,
                f"expected a float output of MatMul '{name_of(before)}', found Q/DQ that no "
                "product reads; remove the pair.",
                "warning",
            )


def stray_pair(model: QuantizedModel) -> Iterator[Finding]:
    """LayerNorm, softmax and GELU have no integer kernel that pays: a pair between float ops is
    only converted forth and back (measured, 1.31). Add, Mul, Sigmoid, LeakyRelu and pools have one
    where their results are codes too."""
    yield from common.stray_pairs(model, KERNELS)


def whole_gelu(model: QuantizedModel) -> Iterator[Finding]:
    """GELU is one node after optimisation; the optimizer knows ½·x·(1+erf) and not
    x·(½·(1+erf)) (measured, 1.31)."""
    yield from _left_over(model, "Erf", "GELU", "write it as the op Gelu (opset 20)")


def whole_layer_norm(model: QuantizedModel) -> Iterator[Finding]:
    """LayerNormalization is one node after optimisation (ONNX Runtime documentation, "Graph
    optimizations")."""
    yield from _left_over(
        model, "Sqrt", "LayerNormalization", "write it as the op LayerNormalization (opset 17)"
    )


def float_product(model: QuantizedModel) -> Iterator[Finding]:
    """A product without Q/DQ runs in float (Quantize ONNX Models)."""
    yield from common.float_products(model)


def loads(model: QuantizedModel) -> Iterator[Finding]:
    """ONNX Runtime loads the file, optimizations on."""
    refusal = model.derived(optimise).refusal
    if refusal and not _explained(model):
        yield Finding("", f"{refusal} Find the op it names, or export again.")


def products_in_integers(model: QuantizedModel) -> Iterator[Finding]:
    """After optimisation no product that has Q/DQ in the file multiplies floats (the optimised
    graph of this very file)."""
    explained = _explained(model) | {found.node for found in inputs_quantized(model)}
    for left in model.derived(optimise).float_products:
        product = product_of(left, model)
        found = f"{left.op_type} on floats in the optimised graph"
        if product is None:
            text = f"found {found}, which is not a product of the file; see its inputs."
            yield Finding(left.name, text, "warning")
        elif product.touched and not product.table and not explained & common.names(product):
            advice = "put Q/DQ with one scale directly on both inputs"
            if left.op_type == "Gemm" and product.node.op_type == "MatMul":
                advice = (
                    "MatMul + Add on a matrix becomes a Gemm with a float bias: keep three "
                    "dimensions, or write a Gemm with an int32 bias"
                )
            text = f"expected an integer product, found {found}; {advice}."
            yield Finding(product.name, text)


def _left_over(model: QuantizedModel, op: str, whole: str, advice: str) -> Iterator[Finding]:
    """Nodes of an op that the optimizer would have fused."""
    for node in model.derived(optimise).nodes:
        if node.op_type == op:
            yield Finding(
                node.name,
                f"expected {whole} as one node, found {op} left over; {advice}.",
                "warning",
            )


def _explained(model: QuantizedModel) -> set[str]:
    """Nodes of which a rule about the file says already why they do not run in integers."""
    return {f.node for rule in STATIC for f in rule(model) if f.severity == "error"}


def product_of(left: OptimisedNode, model: QuantizedModel) -> Product | None:
    """The product of the file that an optimised node stands for.

    Its output is the product's, or that of a bias, a scale or an activation fused into it;
    where layouts were changed only the beginning of its name is left.
    """
    values = {value.name: value for node in model.graph for value in node.outputs}
    product = common.product_behind(values.get(left.output), model)
    if product is not None:
        return product
    names = {str(n): p for p in model.products for n in (p.name, p.node.outputs[0].name)}
    return names.get(max(filter(left.name.startswith, names), key=len, default=""))


def _facts(model: QuantizedModel) -> Mapping[str, Mapping[str, int]]:
    nodes = model.derived(optimise).nodes
    found = {"optimised": dict(Counter(n.op_type for n in nodes).most_common())}
    saturating = saturation(model)
    return found | ({TITLE: saturating} if any(saturating.values()) else {})


STATIC: tuple[Rule, ...] = (
    opset_in_range,
    known_domain,
    code_type,
    zero_point_type,
    scale_constant,
    scale_positive,
    pair_agrees,
    activation_per_tensor,
    weight_axis,
    weight_blocks,
    inputs_quantized,
    table_codes,
    activation_unsigned,
    weight_signed,
    conv_output,
    gemm_bias,
    output_float,
    stray_pair,
    float_product,
)
"""Rules about the file as it is written."""

TARGET = Target(
    rules=(*STATIC, whole_gelu, whole_layer_norm, loads, products_in_integers),
    facts=_facts,
)
