"""ONNX Runtime's own ops, as its optimizers leave them in a file, back in standard ONNX.

The transformers optimizer and the offline optimization of a session write ops of the domain
com.microsoft: each is one formula here, written out with standard ops, so that fusion, blocks and
quantization see what the exporter had written. An op without a formula stays, runs in ONNX Runtime
and is left in float; files tied to a processor, or quantized already, are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ptq_onnx.errors import ModelError
from ptq_onnx.graph.attention_opset23 import (
    Builder,
    Refusal,
    additive,
    attention,
    causal_mask,
    heads_first,
    heads_last,
    present,
    rms_norm,
)
from ptq_onnx.graph.formula import constant, sizes

RUNTIME = "com.microsoft"
TIED = frozenset(("com.microsoft.nchwc", "com.ms.internal.nhwc"))
"""Domains of layouts that only one processor or provider has."""

MISFILED = {"LayerNormalization": 17, "SimplifiedLayerNormalization": 99, "Gelu": 20}
"""Ops that ONNX Runtime puts into the standard domain of opsets that do not have them yet."""

QUANTIZED = ("QLinear", "MatMulNBits", "MatMulInteger", "QAttention", "QGemm", "DynamicQuantize")


def refile(proto: onnx.ModelProto) -> None:
    """Give ONNX Runtime's ops in the standard domain their own one, in place."""
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    moved = False
    for node in proto.graph.node:
        if node.domain in ("", "ai.onnx") and MISFILED.get(node.op_type, 0) > opset:
            node.domain = RUNTIME
            moved = True
    if moved and all(o.domain != RUNTIME for o in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(RUNTIME, 1))


def refuse_tied(model: ir.Model, path: Path) -> None:
    """Raise :class:`ModelError` for a file made for one processor, or quantized already."""
    for node in model.graph:
        where = f"Model {path}: node '{node.name or node.outputs[0].name}'"
        if node.domain in TIED:
            raise ModelError(
                f"{where}: {node.op_type} of the domain '{node.domain}' is in a layout of one"
                " processor; save the optimized model at level 'extended' at most, or use the"
                " exporter's file."
            )
        quantized = node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
        if quantized or node.op_type.startswith(QUANTIZED):
            raise ModelError(
                f"{where}: {node.op_type}: the model is quantized already; give the float model."
            )


def read_back(model: ir.Model) -> list[str]:
    """Write all known ops of ONNX Runtime in standard ONNX, in place; returns notes on others."""
    notes: list[str] = []
    for node in list(model.graph):
        if node.domain != RUNTIME:
            continue
        rule = RULES.get(node.op_type)
        before = set(model.graph)
        try:
            if rule is None:
                raise Refusal("no standard form is known")
            rule(Builder(model.graph, node), node)
        except Refusal as reason:
            model.graph.remove([n for n in reversed(model.graph) if n not in before])
            notes.append(f"{node.op_type} '{node.name}' stays a single op, in float: {reason}")
    return notes


# --- formulas -------------------------------------------------------------------------------


def _skip_norm(build: Builder, node: ir.Node) -> None:
    """LayerNorm(x + skip (+ bias)); the sum may be an output too."""
    simple = node.op_type == "SkipSimplifiedLayerNormalization"
    x, skip, gamma = node.inputs[:3]
    beta = None if simple else present(node.inputs, 3)
    bias = present(node.inputs, 3 if simple else 4)
    total = build("Add", x, skip) if bias is None else build("Add", build("Add", x, bias), skip)
    normed = _normed(build, total, gamma, beta, node, simple)
    results = {0: normed}
    if len(node.outputs) > 3:
        results[3] = total
    build.finish(results)


def _norm(build: Builder, node: ir.Node) -> None:
    simple = node.op_type == "SimplifiedLayerNormalization"
    beta = None if simple else present(node.inputs, 2)
    dims, axis = sizes(node.inputs[0]), node.attributes.get_int("axis", -1)
    if axis != -1 and (dims is None or axis != len(dims) - 1):
        raise Refusal("another axis than the last")
    build.finish({0: _normed(build, node.inputs[0], node.inputs[1], beta, node, simple)})


def _normed(
    build: Builder,
    x: ir.Value | None,
    gamma: ir.Value | None,
    beta: ir.Value | None,
    node: ir.Node,
    simple: bool,
) -> ir.Value:
    epsilon = node.attributes.get_float("epsilon", 1e-12 if "Skip" in node.op_type else 1e-5)
    if simple:
        return rms_norm(build, x, gamma, epsilon)
    inputs = [x, gamma] if beta is None else [x, gamma, beta]
    return build("LayerNormalization", *inputs, attributes={"axis": -1, "epsilon": epsilon})


def _gelu(build: Builder, node: ir.Node) -> None:
    """Gelu, BiasGelu (erf) and FastGelu (tanh), with or without a bias."""
    x, bias = node.inputs[0], present(node.inputs, 1)
    value = x if bias is None else build("Add", x, bias)
    form = {"approximate": "tanh"} if node.op_type == "FastGelu" else {}
    build.finish({0: build("Gelu", value, attributes=form)})


def _quick_gelu(build: Builder, node: ir.Node) -> None:
    """x · sigmoid(α x)"""
    x, alpha = node.inputs[0], node.attributes.get_float("alpha", 1.702)
    scaled = x if alpha == 1 else build("Mul", x, build.number(alpha))
    build.finish({0: build("Mul", x, build("Sigmoid", scaled))})


def _matmul(build: Builder, node: ir.Node) -> None:
    """α · op(A) op(B), either operand transposed in its last two axes."""
    attributes = node.attributes
    if any(attributes.get_int(name, 0) for name in ("transBatchA", "transBatchB")):
        raise Refusal("transBatchA or transBatchB")
    operands = []
    for value, name in zip(node.inputs, ("transA", "transB"), strict=True):
        if attributes.get_int(name, 0) and value is not None:
            value = _swapped(build, value)
        operands.append(value)
    product = build("MatMul", *operands)
    alpha = attributes.get_float("alpha", 1.0)
    build.finish({0: product if alpha == 1 else build("Mul", product, build.number(alpha))})


def _swapped(build: Builder, value: ir.Value) -> ir.Value:
    known, dims = constant(value), sizes(value)
    if known is not None:
        return build.array(np.ascontiguousarray(np.swapaxes(known, -1, -2)), "transposed")
    if dims is None:
        raise Refusal("an unknown rank")
    rank = len(dims)
    return build("Transpose", value, attributes={"perm": [*range(rank - 2), rank - 1, rank - 2]})


ACTIVATIONS = frozenset(("Relu", "Sigmoid", "Tanh"))


def _conv(build: Builder, node: ir.Node) -> None:
    """Conv, a sum, an activation."""
    attributes = {k: v for k, v in node.attributes.items() if not k.startswith("activation")}
    kind = node.attributes.get_string("activation", "")
    inputs = list(node.inputs[:3])
    value = build("Conv", *inputs, attributes=attributes)
    added = present(node.inputs, 3)
    if added is not None:
        value = build("Add", value, added)
    build.finish({0: _activated(build, value, kind, node)})


def _gemm(build: Builder, node: ir.Node) -> None:
    attributes = {k: v for k, v in node.attributes.items() if not k.startswith("activation")}
    kind = node.attributes.get_string("activation", "")
    value = build("Gemm", *node.inputs, attributes=attributes)
    build.finish({0: _activated(build, value, kind, node)})


def _activated(build: Builder, value: ir.Value, kind: str, node: ir.Node) -> ir.Value:
    if not kind:
        return value
    if kind == "HardSigmoid":
        alpha, beta = node.attributes.get_floats("activation_params", (0.2, 0.5))
        return build("HardSigmoid", value, attributes={"alpha": alpha, "beta": beta})
    if kind == "Clip":
        low, high = node.attributes.get_floats("activation_params", (-math.inf, math.inf))
        return build("Clip", value, build.number(low), build.number(high))
    if kind not in ACTIVATIONS:
        raise Refusal(f"the activation {kind}")
    return build(kind, value)


def _packed_attention(build: Builder, node: ir.Node) -> None:
    """Attention: q, k, v from one packed weight [K, 3·N], then as below."""
    attributes = node.attributes
    x, weight, bias = node.inputs[:3]
    heads = attributes.get_int("num_heads", 0)
    array = constant(weight)
    if attributes.get_int("do_rotary", 0):
        raise Refusal("rotary positions inside the op")
    if any(present(node.inputs, i) is not None for i in (3, 4, 6)):
        raise Refusal("a mask by lengths, or past keys and values")
    if array is None or x is None:
        raise Refusal("a weight that is not a constant")
    widths = attributes.get_ints("qkv_hidden_sizes") or [array.shape[1] // 3] * 3
    packed = build("MatMul", x, weight)
    if bias is not None:
        packed = build("Add", packed, bias)
    first = build(
        "Split", packed, build.integers(*widths), attributes={"axis": 2}, outputs=3
    ).producer()
    assert first is not None
    q, k, v = first.outputs
    _heads(build, node, (q, k, v), heads, widths[0] // heads, present(node.inputs, 5))


def _attention(build: Builder, node: ir.Node) -> None:
    """MultiHeadAttention: q, k, v [B, L, H·d], with a packed bias [3·H·d]."""
    q, k, v = (present(node.inputs, i) for i in range(3))
    if any(present(node.inputs, i) is not None for i in (4, 6, 7, 8, 9)):
        raise Refusal("a mask by lengths, or past keys and values")
    if q is None or k is None or v is None:
        raise Refusal("packed keys and values")
    shapes = [sizes(x) for x in (q, k, v)]
    if any(s is None or len(s) not in (3, 4) for s in shapes):
        raise Refusal("an unknown shape")
    heads, bias = node.attributes.get_int("num_heads", 0), constant(present(node.inputs, 3))
    if present(node.inputs, 3) is not None:
        if bias is None:
            raise Refusal("a bias that is not a constant")
        widths = [s[-1] for s in shapes if s is not None and len(s) == 3 and isinstance(s[-1], int)]
        if len(widths) != 3:
            raise Refusal("a bias on inputs of unknown width")
        parts = np.split(bias.reshape(-1), np.cumsum(widths)[:2])
        q, k, v = (
            build("Add", x, build.array(part, "bias"))
            for x, part in zip((q, k, v), parts, strict=True)
        )
    first = shapes[0]
    width = None if first is None else first[-1]
    if not isinstance(width, int):
        raise Refusal("an unknown head size")
    size = width if first is not None and len(first) == 4 else width // heads
    _heads(build, node, (q, k, v), heads, size, present(node.inputs, 5), shapes)


def _heads(
    build: Builder,
    node: ir.Node,
    values: tuple[ir.Value, ir.Value, ir.Value],
    heads: int,
    size: int,
    added: ir.Value | None,
    shapes: list[list[int | str] | None] | None = None,
) -> None:
    masks = [] if added is None else [additive(build, added)]
    if node.attributes.get_int("unidirectional", 0):
        masks.append(causal_mask(build, node.inputs[0] or values[0], values[1], 1))
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(size)
    ranks = [3, 3, 3] if shapes is None else [0 if s is None else len(s) for s in shapes]
    q, k, v = (
        heads_first(build, value, heads) if rank == 3 else value
        for value, rank in zip(values, ranks, strict=True)
    )
    build.finish({0: heads_last(build, attention(build, q, k, v, scale, masks))})


RULES: dict[str, Callable[[Builder, ir.Node], None]] = {
    "Attention": _packed_attention,
    "BiasGelu": _gelu,
    "FastGelu": _gelu,
    "FusedConv": _conv,
    "FusedGemm": _gemm,
    "FusedMatMul": _matmul,
    "Gelu": _gelu,
    "LayerNormalization": _norm,
    "MultiHeadAttention": _attention,
    "QuickGelu": _quick_gelu,
    "SimplifiedLayerNormalization": _norm,
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
}
"""The formula of each op."""
