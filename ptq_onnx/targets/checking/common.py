"""What the rules of several targets look for."""

from __future__ import annotations

from collections.abc import Container, Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.walking import is_constant, name_of, through_layout
from ptq_onnx.graph.codings import DEQUANTIZE, QUANTIZE
from ptq_onnx.targets.checking.coding import INT32, Coding, back_through_moves, constant
from ptq_onnx.targets.checking.product import PRODUCTS, Operand, Product, weight_axis
from ptq_onnx.targets.checking.quantized_model import QuantizedModel
from ptq_onnx.targets.checking.result import Finding, Severity


def operands(model: QuantizedModel) -> Iterator[tuple[Product, Operand, Coding]]:
    """Every quantized factor of every product."""
    for product in model.products:
        for operand in product.operands:
            if operand.dequantize is not None:
                yield product, operand, operand.dequantize


def weights(model: QuantizedModel) -> Iterator[tuple[Product, Operand, Coding]]:
    """Every quantized weight of every product."""
    return ((p, o, c) for p, o, c in operands(model) if o.weight)


def activations(model: QuantizedModel) -> Iterator[tuple[Product, Operand, Coding]]:
    """Every quantized factor that is not a weight."""
    return ((p, o, c) for p, o, c in operands(model) if not o.weight)


def once(findings: Iterator[Finding]) -> Iterator[Finding]:
    """Without repetitions: several products may read one node."""
    yield from dict.fromkeys(findings)


def first_codings(model: QuantizedModel) -> Iterator[Coding]:
    """Every QuantizeLinear, and the DequantizeLinear nodes of stored codes: one per tensor."""
    return (c for c in model.codings if c.quantizes or _quantizer(c) is None)


def opset_outside(model: QuantizedModel, low: int, high: int, reader: str) -> Iterator[Finding]:
    """A finding where the model's opset is not from ``low`` to ``high``; ``reader``: who takes
    these."""
    if not low <= model.opset <= high:
        yield Finding(
            "",
            f"{reader} takes opset {low} to {high}, found {model.opset}; "
            "export with --opset, or convert the file.",
        )


def computed_parameters(model: QuantizedModel, *, dynamic: bool = False) -> Iterator[Finding]:
    """Scales and zero points that are not constants; ``dynamic``: those of DynamicQuantizeLinear
    may be computed."""
    for coding in first_codings(model):
        if dynamic and coding.dynamic:
            continue
        for what, array in (("scale", coding.scale), ("zero point", coding.zero_point)):
            if array is None:
                yield Finding(
                    coding.name,
                    f"expected the {what} as an initializer, found one computed at run time; "
                    "store the calibrated value.",
                )


def bad_scales(model: QuantizedModel) -> Iterator[Finding]:
    """Scales that are zero, negative, infinite or not a number."""
    for coding in first_codings(model):
        scale = coding.scale
        if scale is None or (np.isfinite(scale).all() and (scale > 0).all()):
            continue
        worst = scale[~(np.isfinite(scale) & (scale > 0))].flat[0]
        yield Finding(
            coding.name,
            f"expected a positive finite scale, found {worst:g}; a channel that is always zero "
            "takes any positive scale.",
        )


def other_codings(model: QuantizedModel, codes: Container[ir.DataType | None]) -> Iterator[Coding]:
    """Those whose codes are of another type than these, or int32, which is a bias."""
    return (
        coding
        for coding in first_codings(model)
        if coding.dtype not in codes and coding.dtype != ir.DataType.INT32
    )


def unlike_zero_points(model: QuantizedModel) -> Iterator[Finding]:
    """Zero points of another type than the codes."""
    for coding in model.codings:
        found, codes = coding.zero_point_type, coding.dtype
        if not coding.quantizes and None not in (found, codes) and found != codes:
            yield Finding(
                coding.name,
                f"expected a zero point of the codes' type {_name(codes)}, found {_name(found)}; "
                "store it in that type.",
            )


def unlike_pairs(model: QuantizedModel) -> Iterator[Finding]:
    """DequantizeLinear with another scale or zero point than its QuantizeLinear."""
    for coding in model.codings:
        other = None if coding.quantizes else _quantizer(coding)
        if other is None:
            continue
        for what, mine, theirs in (
            ("scale", coding.scale, other.scale),
            ("zero point", coding.zero_point, other.zero_point),
        ):
            if mine is not None and theirs is not None and not _same(mine, theirs):
                yield Finding(
                    coding.name,
                    f"expected the {what} of its QuantizeLinear '{other.name}' "
                    f"({theirs.flat[0]:g}), found {mine.flat[0]:g}; use one for both.",
                )


def per_axis_activations(model: QuantizedModel) -> Iterator[Finding]:
    """Activations with a scale per channel or per block in front of a product."""
    for product, _, coding in activations(model):
        if not coding.per_tensor:
            count = "several" if coding.scale is None else coding.scale.size
            yield Finding(
                coding.name,
                f"expected one scale for the input of '{product.name}', found {count} on axis "
                f"{coding.axis}; fold the factors into the weight before quantizing it.",
            )


def wrong_weight_axes(model: QuantizedModel) -> Iterator[Finding]:
    """Weights whose scales do not lie on the axis of the output channels."""
    for product, operand, coding in weights(model):
        expected = weight_axis(product, operand)
        if coding.per_tensor or coding.block_size or expected is None or coding.scale is None:
            continue
        codes = constant(coding.node.inputs[0])
        rank = 0 if codes is None else codes.ndim
        axis = coding.axis + (rank if coding.axis < 0 else 0)
        if axis != expected:
            yield Finding(
                coding.name,
                f"expected the weight of {product.node.op_type} '{product.name}' to be quantized "
                f"along its output channels (axis {expected}), found axis {axis}; quantize it "
                "again along that axis.",
            )


def half_quantized(
    model: QuantizedModel, product: Product, on_codes: Container[str] = ()
) -> Finding:
    """Says of a product which factor is quantized and which is not: an error, but where its weight
    alone is float and other ops compute on the codes that it reads the values of."""
    bare = next(o for o in product.operands if o.dequantize is None)
    other = product.operands[1 - bare.index]
    kind = "weight" if bare.weight else "activation"
    text = (
        f"expected Q/DQ on both inputs, found it on input {other.index} only: input {bare.index} "
        f"('{bare.value.name}') is a float {kind}; quantize it, or take Q/DQ from the other."
    )
    if not bare.weight or other.dequantize is None:
        return Finding(product.name, text)
    integer = {one.node for one in model.products if one.quantized}
    readers = {node for node, _ in through_layout(other.dequantize.node.outputs[0])}
    if any(n in integer or _stays_on_codes(n, on_codes) for n in readers - {product.node}):
        text = (
            f"this linear ({product.node.op_type}) has a float weight ('{bare.value.name}') and"
            " runs in float on codes that others read too; quantize it, unless it is kept in float"
            " on purpose."
        )
        return Finding(product.name, text, "warning")
    return Finding(product.name, text)


def quantized_biases(model: QuantizedModel) -> Iterator[Coding]:
    """DequantizeLinear nodes on int32 codes."""
    return (c for c in model.codings if not c.quantizes and c.dtype == INT32)


def stray_pairs(model: QuantizedModel, on_codes: Container[str] = ()) -> Iterator[Finding]:
    """Q/DQ pairs on activations that no product and no residual add reads.

    A pair right behind a product is not stray: the runtimes fuse it into the product. Nor is one
    in front of an op that has an integer kernel (``on_codes``), if its result has codes too.
    """
    for coding in model.codings:
        quantize = None if coding.quantizes else _quantizer(coding)
        data = None if quantize is None else quantize.node.inputs[0]
        if data is None:
            continue
        before = back_through_moves(data)[0].producer()
        readers = [node for node, _ in through_layout(coding.node.outputs[0])]
        if is_constant(data) or (before is not None and before.op_type in PRODUCTS):
            continue
        if any(_wants_codes(node) or _stays_on_codes(node, on_codes) for node in readers):
            continue
        found = ", ".join(f"{n.op_type} '{name_of(n)}'" for n in readers[:3]) or "graph output"
        yield Finding(
            coding.name,
            f"expected a product or a residual add to read this Q/DQ pair, found {found}; "
            "remove the pair: it costs time and accuracy and saves nothing.",
            "warning",
        )


def float_products(model: QuantizedModel, severity: Severity = "warning") -> Iterator[Finding]:
    """Products without any Q/DQ."""
    for product in model.products:
        if not product.touched and not product.table:
            kind = "linear" if product.linear else "product of activations"
            yield Finding(
                product.name,
                f"this {kind} ({product.node.op_type}) has no Q/DQ and runs in float; quantize "
                "both inputs, unless it is kept in float on purpose.",
                severity,
            )


def foreign_ops(
    model: QuantizedModel, domains: Container[str], reader: str
) -> Iterator[tuple[ir.Node, str]]:
    """Nodes of domains that the reader does not know, each with a text."""
    for node in model.graph:
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain not in domains:
            yield (
                node,
                (
                    f"{reader} has no op {node.op_type} of the domain '{domain}'; "
                    "export the file with standard ONNX ops."
                ),
            )


def names(product: Product) -> set[str]:
    """Those of the product and of the Q/DQ nodes on its inputs."""
    found = (c for o in product.operands for c in (o.dequantize, o.quantize))
    return {product.name, *(c.name for c in found if c is not None)}


FUSED = ("Add", "Mul", "Div", "Sub")
"""Ops behind a product that runtimes merge into it, beside activations."""


def product_behind(
    value: ir.Value | None, model: QuantizedModel, ops: Container[str] | None = None
) -> Product | None:
    """The product that makes a value: by itself, or before a few other ops (``ops``, or any)."""
    products = {p.node: p for p in model.products}
    for _ in range(8):
        node = None if value is None else value.producer()
        if node is None or node in products:
            return None if node is None else products[node]
        if ops is not None and node.op_type not in ops:
            return None
        value = next((v for v in node.inputs if not is_constant(v)), None)
    return None


def dtype_name(coding: Coding) -> str:
    """The type of the codes in lower case."""
    return _name(coding.dtype)


def _name(dtype: ir.DataType | None) -> str:
    return "unknown" if dtype is None else dtype.name.lower()


def _quantizer(coding: Coding) -> Coding | None:
    """The QuantizeLinear that makes the codes of a DequantizeLinear; None for stored codes."""
    data = coding.node.inputs[0]
    node = None if data is None else back_through_moves(data)[0].producer()
    return Coding(node) if node is not None and node.op_type == QUANTIZE else None


def _same(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    return a.size == b.size and bool(np.array_equal(a.ravel(), b.ravel()))


def _stays_on_codes(node: ir.Node, kinds: Container[str]) -> bool:
    """An op of those kinds whose result, clipped or not, nothing but QuantizeLinear reads."""
    return node.op_type in kinds and output_quantized(node)


def output_quantized(node: ir.Node) -> bool:
    """Only QuantizeLinear reads the output, at once or behind ops that move elements, or behind
    one Relu or Clip, which runtimes fuse into it."""
    readers = [reader for reader, _ in through_layout(node.outputs[0])]
    while len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        readers = [reader for reader, _ in through_layout(readers[0].outputs[0])]
    return bool(readers) and all(reader.op_type == QUANTIZE for reader in readers)


def _wants_codes(node: ir.Node) -> bool:
    """A product, a residual add, or another quantizer."""
    if node.op_type == "Add":
        return not any(is_constant(v) for v in node.inputs)
    return node.op_type in (*PRODUCTS, QUANTIZE, DEQUANTIZE)
