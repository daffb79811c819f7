"""Shapes and shape arithmetic as expressions of the dynamic dimensions, in one walk.

ONNX Runtime's symbolic inference gives up where a shape depends on computed padding (windows,
``(ws - H % ws) % ws``) and invents a new name for every dimension behind. Here each dimension is
an integer or a polynomial in the named dimensions of the inputs, which are positive; small integer
tensors are evaluated element by element on the way. What comes out as plain integers is a
constant, whatever the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import sympy
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from sympy.polys.polyerrors import BasePolynomialError

from ptq_onnx.graph.formula import constant, new_constant

Dim = Any
"""An int, or a sympy expression in positive integer symbols."""

Shape = tuple[Dim, ...]
Data = NDArray[np.object_]

LIMIT = 4096
"""Integer tensors of more elements than this are data, not shapes."""

UNTOLD = (ValueError, IndexError, TypeError, ArithmeticError, BasePolynomialError)
"""What a rule raises where a shape or a content cannot be told."""

SAME = frozenset((
    "Softmax", "LayerNormalization", "RMSNormalization", "Gelu", "Erf", "Tanh", "Sigmoid",
    "Relu", "Sqrt", "Reciprocal", "Neg", "Exp", "Log", "Clip", "Cast", "Identity", "HardSwish",
    "Floor", "BatchNormalization", "Sin", "Cos", "Abs", "HardSigmoid", "LeakyRelu", "Elu", "Not",
    "Ceil", "Swish", "Mish", "Softplus", "LogSoftmax", "InstanceNormalization",
    "GroupNormalization", "CumSum", "Round", "Sign", "IsNaN", "IsInf", "QuickGelu",
    "LpNormalization", "Trilu", "Silu", "L2Normalization",
))  # fmt: skip
"""Ops whose first output has the shape of their first input."""

BROADCAST = frozenset((
    "Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "Where", "Equal", "Less", "Greater",
    "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor", "PRelu", "BitwiseAnd", "BitwiseOr",
))  # fmt: skip
REDUCE = frozenset((
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
    "ReduceSumSquare", "ReduceLogSumExp",
))  # fmt: skip
INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


@dataclass(frozen=True)
class Tie:
    """A dynamic size that must be a fixed one for a node to run, by the value that fixes it."""

    size: Dim
    fixed: int
    by: ir.Value
    split: tuple[int, ...] = ()
    """Into what a Reshape cuts it: a hint, for it may also cut the batch."""


class Symbolic:
    """Shapes and integer contents of the values of one graph.

    ``trust``: take what shape inference has said where no rule here tells a shape. Files hold
    shapes of the example they were traced with, which are not to be trusted. ``keep``: where a
    dynamic size meets a fixed one go on with the dynamic one, so that all ties are found.
    """

    def __init__(self, graph: ir.Graph, *, trust: bool = True, keep: bool = False) -> None:
        self.graph, self.trust, self.keep = graph, trust, keep
        self.shapes: dict[ir.Value, Shape] = {}
        self.data: dict[ir.Value, Data] = {}
        self.names: dict[str, Dim] = {}
        self.ties: list[Tie] = []

    def run(self) -> Symbolic:
        """Walk the graph once, in order."""
        for value in self.graph.inputs:
            if value.shape is not None:
                dims = [self.named(d) for d in value.shape]
                if None not in dims:
                    self.shapes[value] = tuple(dims)
        for node in self.graph:
            data = self.contents(node)
            if data is not None and node.outputs:
                self.data[node.outputs[0]] = data
                self.shapes[node.outputs[0]] = data.shape
                continue
            try:
                shapes = self.infer(node)
            except UNTOLD:
                shapes = None
            for value, shape in zip(node.outputs, shapes or self.known(node), strict=False):
                if shape is not None:
                    self.shapes[value] = shape
        return self

    def named(self, dim: int | ir.SymbolicDim) -> Dim | None:
        """The symbol of an input's dynamic dimension."""
        if isinstance(dim, int):
            return dim
        if not dim.value:
            return None
        name = str(dim.value)
        return self.names.setdefault(name, sympy.Symbol(name, integer=True, positive=True))

    # --- reading ------------------------------------------------------------------------

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The shape; of a constant, that of its array."""
        if value is None:
            return None
        if value in self.shapes:
            return self.shapes[value]
        array = constant(value)
        return None if array is None else array.shape

    def content(self, value: ir.Value | None) -> Data | None:
        """The elements of a small constant or of evaluated shape arithmetic."""
        if value is None:
            return None
        if value in self.data:
            return self.data[value]
        array = constant(value)
        if array is None or array.size > LIMIT:
            return None
        return array.astype(object)

    def numbers(self, value: ir.Value | None) -> list[int] | None:
        """The elements where all of them are integers."""
        found = self.content(value)
        if found is None or not all(isinstance(x, (int, np.integer)) for x in found.ravel()):
            return None
        return [int(x) for x in found.ravel()]

    def known(self, node: ir.Node) -> list[Shape | None]:
        """What shape inference has said, where it uses no dimension but the inputs'."""
        found: list[Shape | None] = []
        for value in node.outputs if self.trust else ():
            dims: list[Dim | None] = [None] if value.shape is None else []
            for dim in value.shape or ():
                if isinstance(dim, int):
                    dims.append(dim)
                else:
                    dims.append(self.names.get(str(dim.value)))
            found.append(None if None in dims else tuple(dims))
        return found

    # --- contents -----------------------------------------------------------------------

    def contents(self, node: ir.Node) -> Data | None:
        """The elements of the first output, where they are integers that can be told."""
        if len(node.outputs) != 1 or node.domain != "":
            return None
        kind = node.op_type
        if kind == "Shape":
            shape = self.shape(node.inputs[0])
            if shape is None:
                return None
            start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
            return _objects(shape[start:end])
        if kind == "Size":
            shape = self.shape(node.inputs[0])
            return None if shape is None else _objects(_product(shape)).reshape(())
        if not any(v in self.data or _is_decision(v) for v in node.inputs if v is not None):
            return None
        inputs = [self.content(v) for v in node.inputs]
        if any(
            found is None and v is not None for found, v in zip(inputs, node.inputs, strict=True)
        ):
            return None
        if node.outputs[0].dtype is not None and node.outputs[0].dtype not in INTEGERS:
            floating = kind in ("Cast", "Div", "Mul", "Floor", "Ceil", "Add", "Sub", "Sqrt")
            if not floating:
                return None
        evaluate = CONTENTS.get(kind)
        try:
            if evaluate is not None:
                found = evaluate(node, [x for x in inputs if x is not None])
                if found is not None and found.size <= LIMIT:
                    return found
            return self._evaluate(node, inputs)
        except UNTOLD:
            return None

    def _evaluate(self, node: ir.Node, inputs: Sequence[Data | None]) -> Data | None:
        """onnx's own reference for a node whose inputs are all plain numbers."""
        arrays: dict[str, NDArray[Any]] = {}
        for value, data in zip(node.inputs, inputs, strict=True):
            if value is None or data is None:
                continue
            if any(isinstance(x, sympy.Basic) for x in data.ravel()):
                return None
            dtype = np.int64 if value.dtype is None else value.dtype.numpy()
            arrays[str(value.name)] = np.asarray(data.tolist(), dtype).reshape(data.shape)
        graph = onnx.helper.make_graph(
            [ir.to_proto(node)],
            "one",
            [
                onnx.helper.make_tensor_value_info(
                    n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape
                )
                for n, a in arrays.items()
            ],
            [onnx.helper.make_tensor_value_info(str(node.outputs[0].name), 7, None)],
        )
        opset = onnx.helper.make_opsetid("", self.graph.opset_imports.get("", 21))
        model = onnx.helper.make_model(graph, opset_imports=[opset])
        try:
            results: list[Any] = list(ReferenceEvaluator(model).run(None, arrays))
            found = np.asarray(results[0])
        except Exception:
            return None
        if found.dtype.kind not in "ib" or found.size > LIMIT:
            return None
        return found.astype(object)

    # --- shapes -------------------------------------------------------------------------

    def infer(self, node: ir.Node) -> list[Shape | None] | None:
        """Shapes of the outputs by the op's rule; None where there is no rule or no input."""
        kind = node.op_type
        first = self.shape(node.inputs[0]) if node.inputs else None
        if kind in SAME:
            return None if first is None else [first]
        if kind in BROADCAST:
            shapes = [self.shape(v) for v in node.inputs]
            if None in shapes:
                return None
            self.tie(node, [s for s in shapes if s is not None])
            return [_broadcast([s for s in shapes if s is not None], self.keep)]
        rule = SHAPES.get(kind)
        if rule is not None and first is not None:
            return rule(self, node, first)
        if kind in REDUCE and first is not None:
            return [self._reduced(node, first)]
        if kind in ("ConstantOfShape", "Range"):
            return [self._made(node)]
        return None

    def _reduced(self, node: ir.Node, shape: Shape) -> Shape | None:
        axes = self.axes(node)
        if axes is None:
            axes = list(range(len(shape)))
        axes = [a % len(shape) for a in axes]
        if node.attributes.get_int("keepdims", 1):
            return tuple(1 if i in axes else d for i, d in enumerate(shape))
        return tuple(d for i, d in enumerate(shape) if i not in axes)

    def _made(self, node: ir.Node) -> Shape | None:
        if node.op_type == "ConstantOfShape":
            target = self.content(node.inputs[0])
            return None if target is None else tuple(target.ravel())
        ends = [self.content(v) for v in node.inputs]
        if any(e is None for e in ends):
            return None
        start, limit, delta = (e.ravel()[0] for e in ends if e is not None)
        if any(isinstance(e, float) for e in (start, limit, delta)):
            return (max(math.ceil((limit - start) / delta), 0),)
        return (_tidy(limit - start),) if delta == 1 else None

    def tie(self, node: ir.Node, shapes: Sequence[Shape]) -> None:
        """Note the dynamic sizes that meet a fixed one other than 1, counted from the last axis."""
        for back in range(1, max(map(len, shapes), default=0) + 1):
            dims = {v: s[-back] for v, s in zip(node.inputs, shapes, strict=True) if back <= len(s)}
            fixed = [(v, d) for v, d in dims.items() if isinstance(d, int) and d != 1]
            for value, number in fixed[:1]:
                if value is not None:
                    self.ties += [
                        Tie(d, number, value) for d in dims.values() if not isinstance(d, int)
                    ]

    def axes(self, node: ir.Node) -> list[int] | None:
        """Axes from the attribute or the second input."""
        axes = node.attributes.get_ints("axes")
        if axes is not None:
            return list(axes)
        return self.numbers(node.inputs[1]) if len(node.inputs) > 1 else None


# --- arithmetic ---------------------------------------------------------------------------


def dynamic_names(dim: Dim) -> list[str]:
    """The dynamic dimensions that an expression depends on."""
    return sorted(s.name for s in dim.free_symbols) if isinstance(dim, sympy.Basic) else []


def _is_decision(value: ir.Value) -> bool:
    """True for a constant of one integer or truth value: what a branch may be taken by."""
    array = constant(value)
    return array is not None and array.size == 1 and array.dtype.kind in "ib"


def _objects(items: Any) -> Data:
    array = np.empty(np.shape(items), dtype=object)
    array[...] = items
    return array


def _tidy(value: Any) -> Dim:
    """An int where it is one; expressions in one canonical form."""
    if isinstance(value, sympy.Basic):
        value = sympy.expand(value)
        if value.is_Integer:
            return int(value)
        if value in (sympy.true, sympy.false):
            return bool(value)
        return value
    if isinstance(value, (np.integer, int)):
        return int(value) if not isinstance(value, (bool, np.bool_)) else bool(value)
    return value


def _product(dims: Sequence[Dim]) -> Dim:
    total: Dim = 1
    for dim in dims:
        total = total * dim
    return _tidy(total)


def _quotient(total: Dim, part: Dim) -> Dim:
    """Integer division of positive dimensions; exact wherever the division is."""
    if isinstance(total, int) and isinstance(part, int):
        return total // part if (total >= 0) == (part > 0) else -((-total) // part)
    if isinstance(total, float) or isinstance(part, float):
        return total / part
    ratio = sympy.expand(sympy.cancel(sympy.sympify(total) / part))
    if not ratio.is_integer:
        ratio = sympy.floor(ratio)
    return _tidy(ratio)


def _remainder(value: Dim, by: Dim) -> Dim:
    if isinstance(value, int) and isinstance(by, int):
        return value % by
    quotient = _quotient(value, by)
    return _tidy(value - quotient * by)


def _each(operation: Callable[..., Any]) -> Callable[[ir.Node, list[Data]], Data]:
    """An operation on elements, with ONNX's broadcasting."""

    def evaluate(_: ir.Node, inputs: list[Data]) -> Data:
        function = np.frompyfunc(lambda *a: _tidy(operation(*a)), len(inputs), 1)
        return _objects(function(*inputs))

    return evaluate


def _floor(value: Any) -> Any:
    return sympy.floor(value) if isinstance(value, sympy.Basic) else math.floor(value)


def _ceil(value: Any) -> Any:
    return sympy.ceiling(value) if isinstance(value, sympy.Basic) else math.ceil(value)


def _cast(node: ir.Node, inputs: list[Data]) -> Data | None:
    to = node.attributes.get_int("to", 7)
    if to == ir.DataType.BOOL:
        return _truths(lambda a: _sides(a, 0, lambda sign: sign != 0), inputs)
    if to in (ir.DataType.INT64, ir.DataType.INT32):
        return _each(lambda x: x if isinstance(x, sympy.Basic) else int(x))(node, inputs)
    if to == ir.DataType.FLOAT:
        return _each(lambda x: x if isinstance(x, sympy.Basic) else float(x))(node, inputs)
    return None


def _sides(left: Any, right: Any, holds: Callable[[int], bool]) -> bool | None:
    """Whether a relation holds, by the sign of left - right: where that is the same for all
    positive dimensions, or the relation holds for no sign, or for all, that it can have."""
    left, right = (int(x) if isinstance(x, (bool, np.bool_)) else x for x in (left, right))
    difference = sympy.expand(sympy.sympify(left) - sympy.sympify(right))
    # A dimension is one at least: d = 1 + e with e ≥ 0
    extra = {
        s: 1 + sympy.Symbol(f"{s.name} beyond one", integer=True, nonnegative=True)
        for s in difference.free_symbols
    }
    difference = sympy.expand(difference.subs(extra))
    possible = {1, 0, -1}
    possible -= {1} if difference.is_nonpositive else set()
    possible -= {0} if difference.is_nonzero or difference.is_positive else set()
    possible -= {-1} if difference.is_nonnegative else set()
    answers = {holds(sign) for sign in possible}
    return answers.pop() if len(answers) == 1 else None


def _truths(decide: Callable[..., bool | None], inputs: list[Data]) -> Data | None:
    """A decision for each element; None unless all can be taken."""
    found = _objects(np.frompyfunc(decide, len(inputs), 1)(*inputs))
    return None if any(x is None for x in found.ravel()) else found


def _relation(holds: Callable[[int], bool]) -> Callable[[ir.Node, list[Data]], Data | None]:
    return lambda _, inputs: _truths(lambda a, b: _sides(a, b, holds), inputs)


def _logic(operation: Callable[..., bool]) -> Callable[[ir.Node, list[Data]], Data | None]:
    return lambda _, inputs: _truths(lambda *a: operation(*map(bool, a)), inputs)


def _select(_: ir.Node, inputs: list[Data]) -> Data | None:
    if not all(isinstance(x, (bool, np.bool_, int)) for x in inputs[0].ravel()):
        return None
    return _objects(np.frompyfunc(lambda c, a, b: a if c else b, 3, 1)(*inputs))


def _gather(node: ir.Node, inputs: list[Data]) -> Data:
    axis = node.attributes.get_int("axis", 0)
    return _objects(np.take(inputs[0], inputs[1].astype(np.int64), axis=axis))


def _slice(node: ir.Node, inputs: list[Data]) -> Data:
    data, starts, ends = inputs[0], inputs[1].ravel(), inputs[2].ravel()
    axes = inputs[3].ravel() if len(inputs) > 3 else range(len(starts))
    steps = inputs[4].ravel() if len(inputs) > 4 else [1] * len(starts)
    index: list[slice] = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        ended = None if int(step) < 0 and int(end) < -data.shape[int(axis)] else int(end)
        index[int(axis)] = slice(int(start), ended, int(step))
    return _objects(data[tuple(index)])


def _concat(node: ir.Node, inputs: list[Data]) -> Data:
    return _objects(np.concatenate(inputs, axis=node.attributes.get_int("axis", 0)))


def _reshaped(node: ir.Node, inputs: list[Data]) -> Data:
    return inputs[0].reshape([int(d) for d in inputs[1].ravel()])


def _squeezed(node: ir.Node, inputs: list[Data]) -> Data:
    axes = node.attributes.get_ints("axes") or (
        [int(a) for a in inputs[1].ravel()] if len(inputs) > 1 else None
    )
    return inputs[0].squeeze() if axes is None else inputs[0].squeeze(tuple(axes))


def _unsqueezed(node: ir.Node, inputs: list[Data]) -> Data:
    axes = node.attributes.get_ints("axes") or [int(a) for a in inputs[1].ravel()]
    return np.expand_dims(inputs[0], tuple(axes))


def _transposed(node: ir.Node, inputs: list[Data]) -> Data:
    return inputs[0].transpose(node.attributes.get_ints("perm"))


def _filled(node: ir.Node, inputs: list[Data]) -> Data | None:
    value = node.attributes.get_tensor("value", None)
    number = 0 if value is None else value.numpy().reshape(-1)[0].item()
    if isinstance(number, float):
        return None
    return _objects(np.full([int(d) for d in inputs[0].ravel()], number, object))


def _multiplied(node: ir.Node, inputs: list[Data]) -> Data | None:
    if inputs[0].ndim != 1:
        return None
    keep = node.attributes.get_int("keepdims", 1)
    found = _objects(_product(list(inputs[0])))
    return found.reshape((1,)) if keep else found.reshape(())


def _expanded(node: ir.Node, inputs: list[Data]) -> Data:
    shape = np.broadcast_shapes(inputs[0].shape, tuple(int(d) for d in inputs[1].ravel()))
    return _objects(np.broadcast_to(inputs[0], shape))


CONTENTS: dict[str, Callable[[ir.Node, list[Data]], Data | None]] = {
    "Identity": lambda _, inputs: inputs[0],
    "Add": _each(lambda a, b: a + b),
    "Sub": _each(lambda a, b: a - b),
    "Mul": _each(lambda a, b: a * b),
    "Div": _each(_quotient),
    "Mod": _each(_remainder),
    "Neg": _each(lambda a: -a),
    "Min": _each(
        lambda *a: sympy.Min(*a) if any(isinstance(x, sympy.Basic) for x in a) else min(a)
    ),
    "Max": _each(
        lambda *a: sympy.Max(*a) if any(isinstance(x, sympy.Basic) for x in a) else max(a)
    ),
    "Floor": _each(_floor),
    "Ceil": _each(_ceil),
    "Cast": _cast,
    "Equal": _relation(lambda sign: sign == 0),
    "Greater": _relation(lambda sign: sign > 0),
    "GreaterOrEqual": _relation(lambda sign: sign >= 0),
    "Less": _relation(lambda sign: sign < 0),
    "LessOrEqual": _relation(lambda sign: sign <= 0),
    "Not": _logic(lambda a: not a),
    "And": _logic(lambda a, b: a and b),
    "Or": _logic(lambda a, b: a or b),
    "Xor": _logic(lambda a, b: a != b),
    "Where": _select,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Reshape": _reshaped,
    "Squeeze": _squeezed,
    "Unsqueeze": _unsqueezed,
    "Transpose": _transposed,
    "Expand": _expanded,
    "ReduceProd": _multiplied,
    "ConstantOfShape": _filled,
}
"""The ops of shape arithmetic, on arrays of integers and expressions."""


# --- shape rules --------------------------------------------------------------------------

Found = list[Shape | None] | None


def _broadcast(shapes: Sequence[Shape], keep: bool = False) -> Shape | None:
    rank = max((len(s) for s in shapes), default=0)
    result: list[Dim] = []
    for position in range(rank):
        dims = [s[position - rank] for s in shapes if rank - position <= len(s)]
        wide = list(dict.fromkeys(d for d in dims if d != 1))
        if len(wide) > 1:
            wide = [d for d in wide if isinstance(d, int) != keep][:1]
            if not wide:
                return None
        result.append(wide[0] if wide else 1)
    return tuple(result)


def _matmul(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    second = self.shape(node.inputs[1])
    if second is None or len(first) < 2 or len(second) < 2:
        return None
    for dynamic, fixed, value in (
        (first[-1], second[-2], node.inputs[1]),
        (second[-2], first[-1], node.inputs[0]),
    ):
        if not isinstance(dynamic, int) and isinstance(fixed, int) and value is not None:
            self.ties.append(Tie(dynamic, fixed, value))
    outer = _broadcast([first[:-2], second[:-2]])
    return None if outer is None else [(*outer, first[-2], second[-1])]


def _linear(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    weight = self.shape(node.inputs[1])
    return None if weight is None else [(*first[:-1], weight[-1])]


def _gemm(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    weight = self.shape(node.inputs[1])
    if weight is None:
        return None
    rows = first[1 if node.attributes.get_int("transA", 0) else 0]
    return [(rows, weight[0 if node.attributes.get_int("transB", 0) else 1])]


def _reshape(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    target = self.content(node.inputs[1])
    if target is None:
        return None
    copies = not node.attributes.get_int("allowzero", 0)
    dims = [first[i] if copies and d == 0 else d for i, d in enumerate(target.ravel())]
    if -1 in dims:
        index = dims.index(-1)
        dims[index] = _quotient(_product(first), _product([d for d in dims if d != -1]))
    if node.outputs[0].name and len(first) > 1 and len(dims) > 1:
        self.ties += _cuts(node.outputs[0], first, dims)
    return [tuple(_tidy(d) for d in dims)]


def _cuts(value: ir.Value, first: Shape, dims: Sequence[Dim]) -> list[Tie]:
    """The ties of a Reshape that cuts one dynamic size into fixed ones behind the batch."""
    before, after = list(first[1:]), list(dims[1:])
    for size in list(before):
        if size in after:
            before.remove(size)
            after.remove(size)
    if len(before) != 1 or isinstance(before[0], int) or not after:
        return []
    if not all(isinstance(d, int) and d > 0 for d in after):
        return []
    return [Tie(before[0], _product(after), value, tuple(after))]


def _transpose(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    perm = node.attributes.get_ints("perm") or range(len(first))[::-1]
    return [tuple(first[i] for i in perm)]


def _join(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    shapes = [self.shape(v) for v in node.inputs]
    if None in shapes:
        return None
    axis = node.attributes.get_int("axis", 0) % len(first)
    total = _tidy(sum(s[axis] for s in shapes if s is not None))
    return [(*first[:axis], total, *first[axis + 1 :])]


def _pick(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    indices = self.shape(node.inputs[1])
    axis = node.attributes.get_int("axis", 0) % len(first)
    return None if indices is None else [(*first[:axis], *indices, *first[axis + 1 :])]


def _cut(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    inputs = [self.content(v) for v in node.inputs[1:]]
    if any(i is None for i in inputs[:2]):
        return None
    starts, ends = ([*i.ravel()] for i in inputs[:2] if i is not None)
    axes = self.numbers(node.inputs[3]) if len(node.inputs) > 3 else list(range(len(starts)))
    steps = self.numbers(node.inputs[4]) if len(node.inputs) > 4 else [1] * len(starts)
    if axes is None or steps is None:
        return None
    dims = list(first)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = dims[axis]
        if all(isinstance(x, int) for x in (start, end, size)):
            dims[axis] = len(range(*slice(start, end, step).indices(size)))
        elif step == 1 and isinstance(start, int):
            low = start if start >= 0 else size + start
            if isinstance(end, int) and end >= 2**31 - 1:
                dims[axis] = _tidy(size - low)
            elif isinstance(end, int) and end < 0:
                dims[axis] = _tidy(size + end - low)
            elif not isinstance(end, int) and end == size:
                dims[axis] = _tidy(size - low)
            elif not isinstance(end, int) and (size - end).is_nonnegative:
                dims[axis] = _tidy(end - low)
            else:
                return None
        else:
            return None
    return [tuple(dims)]


def _pieces(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    axis = node.attributes.get_int("axis", 0) % len(first)
    lengths = self.numbers(node.inputs[1]) if len(node.inputs) > 1 else None
    given = node.attributes.get_ints("split")
    if lengths is None and given is not None:
        lengths = list(given)
    if lengths is None:
        size, count = first[axis], len(node.outputs)
        if not isinstance(size, int):
            return None
        step = -(-size // count)
        lengths = [min(step, size - i * step) for i in range(count)]
    return [(*first[:axis], length, *first[axis + 1 :]) for length in lengths]


def _squeeze(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    axes = self.axes(node)
    if axes is None:
        return [tuple(d for d in first if d != 1)]
    gone = [a % len(first) for a in axes]
    return [tuple(d for i, d in enumerate(first) if i not in gone)]


def _unsqueeze(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    axes = self.axes(node)
    if axes is None:
        return None
    rank = len(first) + len(axes)
    new, rest = {a % rank for a in axes}, iter(first)
    return [tuple(1 if i in new else next(rest) for i in range(rank))]


def _pad(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    pads = self.content(node.inputs[1])
    axes = self.numbers(node.inputs[3]) if len(node.inputs) > 3 else list(range(len(first)))
    if pads is None or axes is None:
        return None
    dims, flat = list(first), pads.ravel()
    for i, axis in enumerate(axes):
        dims[axis] = _tidy(dims[axis] + flat[i] + flat[i + len(axes)])
    return [tuple(dims)]


def _expand(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    target = self.content(node.inputs[1])
    return None if target is None else [_broadcast([first, tuple(target.ravel())])]


def _tile(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    repeats = self.content(node.inputs[1])
    if repeats is None:
        return None
    return [tuple(_tidy(d * r) for d, r in zip(first, repeats.ravel(), strict=True))]


def _window(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    """Convolutions and pools."""
    attributes = node.attributes
    weight = self.shape(node.inputs[1]) if node.op_type == "Conv" else None
    kernel = attributes.get_ints("kernel_shape") or (weight[2:] if weight is not None else None)
    if kernel is None or attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    rank = len(kernel)
    pads = attributes.get_ints("pads", (0,) * 2 * rank)
    strides = attributes.get_ints("strides", (1,) * rank)
    dilations = attributes.get_ints("dilations", (1,) * rank)
    ceil = attributes.get_int("ceil_mode", 0)
    spatial: list[Dim] = []
    for i, size in enumerate(first[2:]):
        span = size + pads[i] + pads[i + rank] - dilations[i] * (kernel[i] - 1) - 1
        if ceil:
            span = span + strides[i] - 1
        spatial.append(_tidy(_quotient(_tidy(span), strides[i]) + 1))
    channels = first[1] if weight is None else weight[0]
    if weight is not None and not isinstance(first[1], int) and node.inputs[1] is not None:
        groups = attributes.get_int("group", 1)
        if isinstance(weight[1], int):
            self.ties.append(Tie(first[1], weight[1] * groups, node.inputs[1]))
    return [(first[0], channels, *spatial)]


def _resize(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    sizes = self.content(node.inputs[3]) if len(node.inputs) > 3 else None
    if sizes is not None and len(sizes) == len(first):
        return [tuple(sizes.ravel())]
    scales = self.content(node.inputs[2]) if len(node.inputs) > 2 else None
    if scales is None or len(scales) != len(first):
        return None
    dims: list[Dim] = []
    for size, scale in zip(first, scales.ravel(), strict=True):
        if isinstance(size, int):
            dims.append(math.floor(size * scale))
        elif float(scale).is_integer():
            dims.append(_tidy(size * int(scale)))
        else:
            return None
    return [tuple(dims)]


def _flatten(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    axis = node.attributes.get_int("axis", 1) % (len(first) + 1)
    return [(_product(first[:axis]), _product(first[axis:]))]


def _global_pool(self: Symbolic, node: ir.Node, first: Shape) -> Found:
    return [(*first[:2], *(1,) * (len(first) - 2))]


SHAPES: dict[str, Callable[[Symbolic, ir.Node, Shape], Found]] = {
    "MatMul": _matmul,
    "Linear": _linear,
    "Gemm": _gemm,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Concat": _join,
    "Gather": _pick,
    "Slice": _cut,
    "Split": _pieces,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Pad": _pad,
    "Expand": _expand,
    "Tile": _tile,
    "Conv": _window,
    "AveragePool": _window,
    "MaxPool": _window,
    "Resize": _resize,
    "Flatten": _flatten,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
}
"""Shapes of the outputs from the shape of the first input."""


def fold_shapes(graph: ir.Graph) -> int:
    """Write all shapes that can be told, and make constants of integers that no dynamic dimension
    has a part in; returns how many constants."""
    found = Symbolic(graph).run()
    for value, dims in found.shapes.items():
        if value.producer() is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else str(d) for d in dims])
    count = 0
    for value, data in found.data.items():
        count += _fold(graph, value, data)
    return count


def _fold(graph: ir.Graph, value: ir.Value, data: Data) -> bool:
    if value.is_graph_output() or not value.uses() or value.dtype not in INTEGERS:
        return False
    if not all(isinstance(x, (int, np.integer)) for x in data.ravel()):
        return False
    assert value.dtype is not None
    array = np.asarray(data.tolist(), value.dtype.numpy()).reshape(data.shape)
    value.replace_all_uses_with(new_constant(graph, f"{value.name}_folded", array))
    return True
