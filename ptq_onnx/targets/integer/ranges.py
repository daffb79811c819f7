"""Proved ranges of every tensor of an integer file, by interval arithmetic.

From the types of the codes and the file's own constants, without running it: no input can
leave these ranges. Intervals are kept per channel where constants are. Where a bound follows
from more than intervals (a variance is not negative), the exporter has written it into the
node's metadata with the proof in its source; such a claim is taken, and marked.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ptq_onnx.targets.integer.builder import RANGE_KEY, TYPES
from ptq_onnx.targets.integer.intervals import Interval, corners, truncated


def _limits(each: type[np.integer[Any]]) -> tuple[int, int]:
    found = np.iinfo(each)
    return int(found.min), int(found.max)


INTEGERS = {kind: _limits(each) for kind, each in TYPES.items()}
"""Limits of the integer types of such files."""

LAYOUT = frozenset(
    ["Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Flatten", "Identity"]
)


@dataclass(frozen=True)
class TensorRange:
    """What a tensor can hold. ``claimed``: by a proof in the exporter's source."""

    tensor: str
    node: str
    op_type: str
    dtype: str
    low: int
    high: int
    claimed: bool

    @property
    def bits(self) -> int:
        """Width of a register for it: two's complement where it can be negative."""
        return register_bits(self.low, self.high)


def register_bits(low: int, high: int) -> int:
    """Bits for every integer in [low, high]."""
    if low >= 0:
        return max(high.bit_length(), 1)
    return max((-low - 1).bit_length(), max(high, 0).bit_length()) + 1


@dataclass(frozen=True)
class Overflow:
    """A node whose result may not fit its type, or whose operation is not defined."""

    node: str
    text: str


@dataclass
class Ranges:
    """Ranges by tensor, in graph order, and what may go wrong."""

    tensors: dict[str, TensorRange] = field(default_factory=dict)
    overflows: list[Overflow] = field(default_factory=list)


def integer_ranges(
    model: ir.Model,
    inputs: Mapping[str, tuple[int, int]] | None = None,
    *,
    inferred: bool = False,
) -> Ranges:
    """Ranges of all integer tensors of a model in standard ONNX. Floats are left out.

    ``inputs``: ranges of integer inputs by name, narrower than their types. ``inferred``: the
    model comes from :func:`with_types`.
    """
    model = model if inferred else with_types(model)
    analysis = _Analysis(model)
    for value in model.graph.inputs:
        limits = (inputs or {}).get(str(value.name))
        if limits is not None:
            analysis.found[value] = Interval.of(*limits)
    return analysis.run()


def with_types(model: ir.Model) -> ir.Model:
    """A copy with inferred types and shapes; with those that it has, where an op is unknown."""
    proto = ir.to_proto(model)
    with contextlib.suppress(onnx.shape_inference.InferenceError):
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    return ir.from_proto(proto)


class _Analysis:
    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.found: dict[ir.Value, Interval] = {}
        self.shapes: set[ir.Node] = set()
        self.result = Ranges()

    def run(self) -> Ranges:
        """The ranges of all integer tensors, node by node; a claim in a node's metadata counts as
        proved there."""
        for node in self.graph:
            if not any(v.dtype in (*INTEGERS, ir.DataType.BOOL) for v in node.outputs):
                continue
            rule = RULES.get(node.op_type)
            claim = node.metadata_props.get(RANGE_KEY)
            interval: Interval | None = None
            if rule is not None:
                interval = rule(self, node)
            elif node.op_type in LAYOUT:
                first = self.interval(node.inputs[0])
                interval = None if first is None else first.collapsed()
            if claim is not None:
                low, high = claim.split()
                interval = Interval.of(int(low), int(high))
            for output in node.outputs:
                self.keep(node, output, interval, claim is not None)
        return self.result

    def keep(
        self, node: ir.Node, output: ir.Value, interval: Interval | None, claimed: bool
    ) -> None:
        """Note an output's range, cut to its type where it does not fit, which is a fault."""
        limits = None if output.dtype is None else INTEGERS.get(output.dtype)
        if node.op_type == "Shape" or self.sizes(node):
            return  # sizes of tensors, which no hardware computes
        if limits is None:
            if interval is not None:
                self.found[output] = interval
            return
        if interval is None:
            interval = Interval.of(*limits)
        if interval.least < limits[0] or interval.most > limits[1]:
            self.fault(
                node,
                f"[{interval.least}, {interval.most}] does not fit {kind(output)}",
            )
            interval = Interval.of(max(interval.least, limits[0]), min(interval.most, limits[1]))
        self.found[output] = interval
        name = str(output.name)
        self.result.tensors[name] = TensorRange(
            name,
            str(node.name),
            node.op_type,
            kind(output),
            interval.least,
            interval.most,
            claimed,
        )

    def sizes(self, node: ir.Node) -> bool:
        """True for layout ops on the sizes of tensors."""
        if node.op_type not in ("Concat", "Gather", "Slice", "Squeeze", "Unsqueeze"):
            return False
        inputs = [v for v in node.inputs if v is not None and v.const_value is None]
        found = bool(inputs) and all(
            (p := v.producer()) is not None and (p.op_type == "Shape" or p in self.shapes)
            for v in inputs
        )
        if found:
            self.shapes.add(node)
        return found

    def fault(self, node: ir.Node, text: str) -> None:
        """Note what may go wrong at a node."""
        self.result.overflows.append(Overflow(str(node.name), text))

    def interval(self, value: ir.Value | None) -> Interval | None:
        """The range of a value: found, of a constant, or of its whole type; None for floats."""
        if value is None:
            return None
        if value not in self.found and value.const_value is not None:
            array = value.const_value.numpy()
            if array.dtype.kind not in "iu":
                return None
            self.found[value] = Interval(array, array)
        if value in self.found:
            return self.found[value]
        limits = None if value.dtype is None else INTEGERS.get(value.dtype)
        return None if limits is None else Interval.of(*limits)

    def pair(self, node: ir.Node) -> tuple[Interval, Interval]:
        """The ranges of a node's two inputs, int64's where one is unknown."""
        x, y = self.interval(node.inputs[0]), self.interval(node.inputs[1])
        unknown = Interval.of(*INTEGERS[ir.DataType.INT64])
        return x or unknown, y or unknown

    # --- rules --------------------------------------------------------------------------

    def add(self, node: ir.Node) -> Interval:
        """[a + c, b + d]"""
        x, y = self.pair(node)
        return Interval(x.low + y.low, x.high + y.high)

    def sub(self, node: ir.Node) -> Interval:
        """[a − d, b − c]"""
        x, y = self.pair(node)
        return Interval(x.low - y.high, x.high - y.low)

    def mul(self, node: ir.Node) -> Interval:
        """From the products of the ends; of a value with itself, its square."""
        x, y = self.pair(node)
        if node.inputs[0] is node.inputs[1]:  # a square
            most = np.maximum(abs(x.low), abs(x.high))
            least = np.where((x.low <= 0) & (x.high >= 0), 0, np.minimum(abs(x.low), abs(x.high)))
            return Interval(least * least, most * most)
        return corners(lambda a, b: a * b, x, y)

    def div(self, node: ir.Node) -> Interval:
        """From the quotients of the ends, rounded to zero; a fault where the divisor can be
        zero."""
        x, y = self.pair(node)
        if y.least <= 0 <= y.most:
            self.fault(node, "the divisor can be zero")
            return x.collapsed()
        return corners(truncated, x, y)

    def absolute(self, node: ir.Node) -> Interval | None:
        """The range of |x|."""
        x = self.interval(node.inputs[0])
        if x is None:
            return None
        least = np.maximum(np.maximum(x.low, -x.high), 0)
        return Interval(least, np.maximum(-x.low, x.high))

    def bit_shift(self, node: ir.Node) -> Interval:
        """The range of x shifted; a fault for a shift by the type's width or more."""
        x, by = self.pair(node)
        dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
        width = 64 if dtype == ir.DataType.UINT64 else 32 if dtype == ir.DataType.UINT32 else 8
        if by.most >= width or by.least < 0:
            self.fault(node, f"a shift by {by.least} to {by.most} of {width} bits")
            by = Interval.of(max(by.least, 0), min(by.most, width - 1))
        if node.attributes.get_string("direction", "") == "LEFT":
            return Interval(x.low << by.low, x.high << by.high)
        return Interval(x.low >> by.high, x.high >> by.low)

    def bitwise_and(self, node: ir.Node) -> Interval:
        """From 0 to the smaller of the two largest values: neither is negative."""
        x, y = self.pair(node)
        return Interval.of(0, min(x.most, y.most))

    def clip(self, node: ir.Node) -> Interval | None:
        """The range of x, cut to the ends given."""
        x, low, high = (self.interval(v) for v in (*node.inputs, None, None)[:3])
        if x is None:
            return None
        edges = x.least if low is None else low.least, x.most if high is None else high.most
        return Interval(np.clip(x.low, *edges), np.clip(x.high, *edges))

    def maximum(self, node: ir.Node) -> Interval:
        """The larger of both ends."""
        x, y = self.pair(node)
        return Interval(np.maximum(x.low, y.low), np.maximum(x.high, y.high))

    def minimum(self, node: ir.Node) -> Interval:
        """The smaller of both ends."""
        x, y = self.pair(node)
        return Interval(np.minimum(x.low, y.low), np.minimum(x.high, y.high))

    def same(self, node: ir.Node) -> Interval | None:
        """The range of the first input."""
        return self.interval(node.inputs[0])

    def truth(self, node: ir.Node) -> Interval:
        """0 or 1"""
        return Interval.of(0, 1)

    def union(self, node: ir.Node) -> Interval | None:
        """What covers all inputs; of Where, without the condition."""
        inputs = node.inputs[1:] if node.op_type == "Where" else node.inputs
        parts = [self.interval(v) for v in inputs]
        known = [p for p in parts if p is not None]
        if not known:
            return None
        return Interval.of(min(p.least for p in known), max(p.most for p in known))

    def gather(self, node: ir.Node) -> Interval | None:
        """The range of all data; a fault where an index can be beyond the axis."""
        data, indices = node.inputs[0], self.interval(node.inputs[1])
        found = self.interval(data)
        axis = node.attributes.get_int("axis", 0)
        if data is not None and data.shape is not None and indices is not None:
            size = data.shape[axis]
            if isinstance(size, int) and (indices.least < -size or indices.most >= size):
                text = f"indices {indices.least} to {indices.most} of {size} entries"
                self.fault(node, text)
        return None if found is None else found.collapsed()

    def reduce_sum(self, node: ir.Node) -> Interval | None:
        """The range of the sum, by channels where they are summed, else by the number of
        addends."""
        x = self.interval(node.inputs[0])
        axes = node.inputs[1].const_value if node.inputs[1] is not None else None
        if x is None or axes is None:
            return None
        count = self.size(node.inputs[0], [int(a) for a in axes.numpy()])
        if count is None:
            self.fault(node, "the number of addends is not known")
            return None
        last = [int(a) for a in axes.numpy()] == [-1]
        if last and x.low.ndim and x.low.shape[-1] == x.high.shape[-1] == count:
            return Interval(*(e.sum(axis=-1, keepdims=True) for e in (x.low, x.high)))
        return Interval.of(count * x.least, count * x.most)

    def reduce_max(self, node: ir.Node) -> Interval | None:
        """One range for all channels."""
        x = self.interval(node.inputs[0])
        return None if x is None else x.collapsed()

    def size(self, value: ir.Value | None, axes: list[int]) -> int | None:
        """How many elements the axes have together; None where that is not known."""
        if value is None or value.shape is None:
            return None
        sizes = [value.shape[a] for a in axes]
        known = [s for s in sizes if isinstance(s, int)]
        return math.prod(known) if len(known) == len(sizes) else None

    def product(self, node: ir.Node) -> Interval | None:
        """MatMulInteger and ConvInteger: exact per output where the weight is constant."""
        x, zero = self.interval(node.inputs[0]), self.zero(node, 2)
        if x is None:
            return None
        low, high = x.least - zero, x.most - zero
        if any(node.attributes.get_ints("pads", [0])):  # zeros are filled in
            low, high = min(low, 0), max(high, 0)
        weight = node.inputs[1]
        assert weight is not None
        if weight.const_value is not None:
            array = weight.const_value.numpy().astype(np.int64) - self.zero(node, 3)
            conv = node.op_type == "ConvInteger"
            rows = array.reshape(len(array), -1) if conv else array.T
            most = np.maximum(rows * low, rows * high).sum(axis=-1)
            least = np.minimum(rows * low, rows * high).sum(axis=-1)
            return Interval.of(least.min(), most.max())
        count = self.size(node.inputs[0], [-1])
        y = self.interval(weight)
        if count is None or y is None:
            self.fault(node, "the number of addends is not known")
            return None
        other = y.least - self.zero(node, 3), y.most - self.zero(node, 3)
        products = [a * b for a in (low, high) for b in other]
        return Interval.of(count * min(*products, 0), count * max(*products, 0))

    def zero(self, node: ir.Node, index: int) -> int:
        """The zero point at an input of the node; 0 where it has none."""
        value = node.inputs[index] if len(node.inputs) > index else None
        found = self.interval(value)
        return 0 if found is None else found.least


def kind(value: ir.Value) -> str:
    """``int64`` and so on."""
    return "" if value.dtype is None else value.dtype.name.lower()


RULES: dict[str, Callable[[_Analysis, ir.Node], Interval | None]] = {
    "Add": _Analysis.add,
    "Sub": _Analysis.sub,
    "Mul": _Analysis.mul,
    "Div": _Analysis.div,
    "Abs": _Analysis.absolute,
    "BitShift": _Analysis.bit_shift,
    "BitwiseAnd": _Analysis.bitwise_and,
    "Clip": _Analysis.clip,
    "Max": _Analysis.maximum,
    "Min": _Analysis.minimum,
    "Cast": _Analysis.same,
    "Less": _Analysis.truth,
    "Greater": _Analysis.truth,
    "GreaterOrEqual": _Analysis.truth,
    "Where": _Analysis.union,
    "Concat": _Analysis.union,
    "Expand": _Analysis.reduce_max,
    "Gather": _Analysis.gather,
    "ReduceSum": _Analysis.reduce_sum,
    "ReduceMax": _Analysis.reduce_max,
    "MatMulInteger": _Analysis.product,
    "ConvInteger": _Analysis.product,
}
"""How each op moves intervals."""
