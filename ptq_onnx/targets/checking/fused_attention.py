"""What TensorRT's fused attention asks for: QKᵀ, softmax and A·V as one kernel.

Source: NVIDIA TensorRT developer guide, "Fused Attention" (quoted in NVIDIA/TensorRT issues 2981
and 4167; 3714 sees three slow kernels where it is not met), and NVIDIA/Model-Optimizer issue 1289
for FP8. All are warnings: without the fusion the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from ptq_onnx.blocks.walking import consumers, is_constant, is_layout, name_of
from ptq_onnx.graph.codings import DEQUANTIZE, QUANTIZE
from ptq_onnx.targets.checking.coding import FP8, Coding, back_through_moves, is_move
from ptq_onnx.targets.checking.product import Product
from ptq_onnx.targets.checking.quantized_model import QuantizedModel
from ptq_onnx.targets.checking.result import Finding

HEAD_SIZES = (16, 32, 64)
MOST_TOKENS = 512
SCORE_OPS = ("Mul", "Div", "Add", "Where")
"""Ops between QKᵀ and softmax: scale and mask."""


@dataclass(frozen=True)
class Attention:
    """A softmax between two products, at least one of which is quantized."""

    first: Product
    softmax: ir.Node
    second: Product


def find_attention(model: QuantizedModel) -> Iterator[Attention]:
    """Every attention with codes in it."""
    products = {p.node: p for p in model.products if not p.linear}
    for softmax in model.graph:
        if softmax.op_type != "Softmax" or softmax.inputs[0] is None:
            continue
        scores = before_scores(softmax.inputs[0])
        first = None if scores is None else products.get(scores)
        second = next((products[n] for n in _readers(softmax.outputs[0]) if n in products), None)
        if first is None or second is None or first is second:
            continue
        if first.touched or second.touched:
            yield Attention(first, softmax, second)


def before_scores(value: ir.Value, passed: list[ir.Node] | None = None) -> ir.Node | None:
    """What makes the logits, before scale, bias and mask, which are added to ``passed``."""
    node = value.producer()
    while node is not None and (is_layout(node) or node.op_type in SCORE_OPS):
        if passed is not None:
            passed.append(node)
        data = next((v for v in node.inputs if not is_constant(v)), None)
        node = None if data is None else data.producer()
    return node


def attention_output(model: QuantizedModel) -> Iterator[Finding]:
    """Attention fuses in INT8 or FP8 with Q/DQ before the first product, behind softmax and right
    behind the second product (Fused Attention; NVIDIA/TensorRT issues 2981, 4167)."""
    for found in find_attention(model):
        if not found.second.quantized:
            continue
        for node in _ahead(found.second.node.outputs[0]):
            if node is None or node.op_type != QUANTIZE:
                what = "none" if node is None else f"{node.op_type} '{name_of(node)}'"
                yield Finding(
                    found.second.name,
                    f"expected QuantizeLinear right behind the second product, found {what}, with"
                    " which attention is not fused; quantize there (of our own files: leave out"
                    " --centre-values).",
                    "warning",
                )
                break


def attention_head_size(model: QuantizedModel) -> Iterator[Finding]:
    """Quantized attention fuses with 16, 32 or 64 channels a head (Fused Attention)."""
    for found in find_attention(model):
        keys, values = found.first.operands[0].value, found.second.operands[1].value
        sizes = {model.size(keys, -1), model.size(values, -1)} - {None, *HEAD_SIZES}
        if sizes:
            yield Finding(
                found.first.name,
                f"expected 16, 32 or 64 channels a head, found {sizes.pop()}: attention is not"
                " fused, and its products cost more than in float; leave them in float where"
                " speed counts (--keep-float softmax).",
                "warning",
            )


def attention_length(model: QuantizedModel) -> Iterator[Finding]:
    """Quantized attention fuses with at most 512 tokens (Fused Attention; NVIDIA/TensorRT issue
    3714)."""
    for found in find_attention(model):
        tokens = model.size(found.softmax.outputs[0], -1)
        if tokens is not None and tokens > MOST_TOKENS:
            yield Finding(
                found.first.name,
                f"expected at most 512 tokens, found {tokens}: attention is not fused, and runs as"
                " three kernels; leave it in float where speed counts (--keep-float softmax).",
                "warning",
            )


def fp8_attention_order(model: QuantizedModel) -> Iterator[Finding]:
    """In FP8 the scaling of QKᵀ and the transpose of K stand before QuantizeLinear, so that codes
    enter the product (NVIDIA/Model-Optimizer issue 1289)."""
    for found in find_attention(model):
        for operand in found.first.operands:
            coded = operand.dequantize is not None and operand.dequantize.dtype == FP8
            behind = [m for m in operand.moves if m.op_type == "Transpose"] if coded else []
            scaled = _scaled_codes(operand.value)
            for node in [*behind[:1], *scaled]:
                yield Finding(
                    name_of(node),
                    f"expected {node.op_type} before QuantizeLinear, found it between"
                    f" DequantizeLinear and '{found.first.name}'; quantize behind it.",
                    "warning",
                )


def _scaled_codes(value: ir.Value) -> list[ir.Node]:
    """The multiplication between FP8 codes and a value."""
    node = back_through_moves(value)[0].producer()
    if node is None or node.op_type not in ("Mul", "Div"):
        return []
    made = (back_through_moves(v)[0].producer() for v in node.inputs if v is not None)
    codes = (Coding(n) for n in made if n is not None and n.op_type == DEQUANTIZE)
    return [node] if any(coding.dtype == FP8 for coding in codes) else []


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """What reads a value, also behind ops that move it and behind Q/DQ."""
    for node in _ahead(value):
        if node is not None and node.op_type in (QUANTIZE, DEQUANTIZE):
            yield from _readers(node.outputs[0])
        elif node is not None:
            yield node


def _ahead(value: ir.Value) -> Iterator[ir.Node | None]:
    """The ops that read a value behind those that move it; None where it is an output."""
    if value.is_graph_output():
        yield None
    for node, index in consumers(value):
        if is_move(node) and index == 0:
            for output in node.outputs:
                yield from _ahead(output)
        elif node.op_type != "Shape":
            yield node
