"""Attention and RMSNormalization of opset 23 in the ops of older opsets.

Quantization looks inside attention: at the logits, the map and their product with the values. So
the single op is written out when a model is loaded, in the same form as exporters of older opsets
write it; where several heads of q share one of k and v, that one is repeated. What cannot be (a
cache, softcap) is left as it is, with a note.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.graph.formula import constant, new_constant, sizes

Inputs = Sequence[ir.Value | None]


class Refusal(Exception):
    """Why a node cannot be written out."""


class Builder:
    """Nodes in the place of one node, before which they are inserted."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.stem = node.name or node.outputs[0].name or node.op_type
        self._count = 0

    def __call__(
        self,
        op: str,
        *inputs: ir.Value | None,
        attributes: Mapping[str, Any] | None = None,
        outputs: int = 1,
        domain: str = "",
    ) -> ir.Value:
        """A node; returns its first output."""
        self._count += 1
        name = f"{self.stem}/{op}_{self._count}"
        node = ir.node(
            op, list(inputs), dict(attributes or {}), domain=domain, name=name, num_outputs=outputs
        )
        for index, value in enumerate(node.outputs):
            value.name = f"{name}_output_{index}"
            value.dtype = ir.DataType.FLOAT
        node.metadata_props.update(self.node.metadata_props)
        self.graph.insert_before(self.node, node)
        return node.outputs[0]

    def number(self, value: float) -> ir.Value:
        """A scalar constant."""
        return new_constant(self.graph, f"{self.stem}/number", np.array(value, np.float32))

    def integers(self, *values: int) -> ir.Value:
        """A constant list of integers."""
        return new_constant(self.graph, f"{self.stem}/integers", np.array(values, np.int64))

    def array(self, values: NDArray[Any], name: str) -> ir.Value:
        """A constant tensor."""
        return new_constant(self.graph, f"{self.stem}/{name}", values)

    def finish(self, results: Mapping[int, ir.Value]) -> None:
        """``results`` take the names and readers of the node's outputs; the node goes."""
        for index, value in enumerate(self.node.outputs):
            if index not in results and (value.uses() or value.is_graph_output()):
                raise Refusal(f"its output {index} is read")
        for index, new in results.items():
            old = self.node.outputs[index]
            new.name, new.type, new.shape = old.name, old.type, old.shape
            old.name = f"{old.name}_replaced"
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        last = results[0].producer()
        if last is not None:
            last.name = self.node.name
        self.graph.remove(self.node, safe=True)


def present(values: Inputs, index: int) -> ir.Value | None:
    """The optional input, or None."""
    return values[index] if index < len(values) else None


def heads_first(build: Builder, value: ir.Value, heads: int) -> ir.Value:
    """[B, L, H·d] → [B, H, L, d]"""
    split = build("Reshape", value, build.integers(0, 0, heads, -1))
    return build("Transpose", split, attributes={"perm": [0, 2, 1, 3]})


def heads_last(build: Builder, value: ir.Value) -> ir.Value:
    """[B, H, L, d] → [B, L, H·d]"""
    moved = build("Transpose", value, attributes={"perm": [0, 2, 1, 3]})
    return build("Reshape", moved, build.integers(0, 0, -1))


def repeat_heads(
    build: Builder, value: ir.Value, heads: int, times: int, width: int | None
) -> ir.Value:
    """[B, H / times, L, d] → [B, H, L, d], each head ``times`` times in a row."""
    if width is None:
        raise Refusal("grouped heads of an unknown size")
    apart = build("Unsqueeze", value, build.integers(2))
    spread = build("Expand", apart, build.integers(1, 1, times, 1, 1))
    return build("Reshape", spread, build.integers(0, heads, -1, width))


def _width(value: ir.Value, heads: int) -> int | None:
    """The size of a head of [B, L, H·d], or of [B, H, L, d] with ``heads`` 1."""
    dims = sizes(value)
    last = None if dims is None else dims[-1]
    return last // heads if isinstance(last, int) else None


def attention(
    build: Builder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    scale: float,
    masks: Sequence[ir.Value],
) -> ir.Value:
    """softmax(q kᵀ · scale + masks) v, all [B, H, L, d]."""
    logits = build("MatMul", q, build("Transpose", k, attributes={"perm": [0, 1, 3, 2]}))
    logits = build("Mul", logits, build.number(scale))
    for mask in masks:
        logits = build("Add", logits, mask)
    return build("MatMul", build("Softmax", logits, attributes={"axis": -1}), v)


def additive(build: Builder, mask: ir.Value) -> ir.Value:
    """A boolean mask as numbers to add: nothing where true, minus infinity where false."""
    if mask.dtype != ir.DataType.BOOL:
        return mask
    known = constant(mask)
    if known is not None:
        return build.array(np.where(known, 0, -np.inf).astype(np.float32), "mask")
    return build("Where", mask, build.number(0.0), build.number(-math.inf))


def causal_mask(build: Builder, q: ir.Value, k: ir.Value, axis: int) -> ir.Value:
    """Minus infinity above the diagonal; the lengths must be known."""
    rows, columns = sizes(q), sizes(k)
    if rows is None or columns is None:
        raise Refusal("is_causal with an unknown length")
    length, width = rows[axis], columns[axis]
    if not isinstance(length, int) or not isinstance(width, int):
        raise Refusal("is_causal with a dynamic length")
    above = np.triu(np.full((length, width), -np.inf, np.float32), 1)
    return build.array(above, "causal")


def _attention(build: Builder, node: ir.Node) -> None:
    attributes = node.attributes
    if attributes.get_float("softcap", 0.0):
        raise Refusal("softcap")
    if any(present(node.inputs, i) is not None for i in (4, 5)):
        raise Refusal("past keys and values")
    q, k, v = node.inputs[:3]
    dims = sizes(q)
    if q is None or k is None or v is None or dims is None:
        raise Refusal("an unknown shape")
    flat = len(dims) == 3
    masks: list[ir.Value] = []
    if attributes.get_int("is_causal", 0):
        masks.append(causal_mask(build, q, k, 1 if flat else 2))
    given = present(node.inputs, 3)
    if given is not None:
        masks.append(additive(build, given))
    if flat:
        heads, shared = attributes.get_int("q_num_heads", 0), attributes.get_int("kv_num_heads", 0)
        if not heads or not shared or heads % shared:
            raise Refusal(f"{heads} heads of q on {shared} of k and v")
        widths = [_width(x, x_heads) for x, x_heads in ((k, shared), (v, shared))]
        q = heads_first(build, q, heads)
        k, v = (heads_first(build, x, shared) for x in (k, v))
        size = dims[-1] // heads if isinstance(dims[-1], int) else None
    else:
        others = sizes(k)
        if others is None or not isinstance(others[1], int) or not isinstance(dims[1], int):
            raise Refusal("an unknown number of heads")
        heads, shared = dims[1], others[1]
        if heads % shared:
            raise Refusal(f"{heads} heads of q on {shared} of k and v")
        widths = [_width(x, 1) for x in (k, v)]
        size = dims[-1] if isinstance(dims[-1], int) else None
    if heads != shared:
        k, v = (
            repeat_heads(build, x, heads, heads // shared, width)
            for x, width in zip((k, v), widths, strict=True)
        )
    scale = attributes.get_float("scale", None)
    if scale is None:
        if size is None:
            raise Refusal("an unknown head size")
        scale = 1 / math.sqrt(size)
    result = attention(build, q, k, v, scale, masks)
    build.finish({0: heads_last(build, result) if flat else result})


def _rms_norm(build: Builder, node: ir.Node) -> None:
    x, scale = node.inputs[:2]
    dims, weight = sizes(x), sizes(scale)
    axis = node.attributes.get_int("axis", -1)
    if dims is None or weight is None or axis % len(dims) != len(dims) - 1 or len(weight) != 1:
        raise Refusal("another axis than the last")
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    build.finish({0: rms_norm(build, x, scale, epsilon)})


def rms_norm(
    build: Builder, x: ir.Value | None, scale: ir.Value | None, epsilon: float
) -> ir.Value:
    """x / √(mean x² + ε) · scale, over the last axis."""
    square = build("Mul", x, x)
    mean = build("ReduceMean", square, build.integers(-1), attributes={"keepdims": 1})
    root = build("Sqrt", build("Add", mean, build.number(epsilon)))
    return build("Mul", build("Div", x, root), scale)


WRITTEN_OUT = {"Attention": _attention, "RMSNormalization": _rms_norm}


def write_out(model: ir.Model) -> list[str]:
    """Write out what is known, in place; returns notes on what was left as it is."""
    notes: list[str] = []
    for node in list(model.graph):
        rule = WRITTEN_OUT.get(node.op_type) if node.domain == "" else None
        if rule is None:
            continue
        before = set(model.graph)
        try:
            rule(Builder(model.graph, node), node)
        except Refusal as reason:
            model.graph.remove([n for n in reversed(model.graph) if n not in before])
            notes.append(f"{node.op_type} '{node.name}' stays a single op, in float: {reason}")
    return notes
