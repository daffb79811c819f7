"""Shapes and shape arithmetic as expressions of the dynamic dimensions, in one walk.

ONNX Runtime's symbolic inference gives up where a shape depends on computed padding (windows,
``(ws - H % ws) % ws``) and invents a new name for every dimension behind. Here each dimension is
an integer or a polynomial in the named dimensions of the inputs, which are positive; small integer
tensors are evaluated element by element on the way. What comes out as plain integers is a
constant, whatever the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import sympy
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from ptq_onnx.graph.formula import constant, names_in, new_constant
from ptq_onnx.graph.symbolic_contents import CONTENTS
from ptq_onnx.graph.symbolic_dims import UNTOLD, Data, Dim, Shape, Tie, as_data, product_of, tidy
from ptq_onnx.graph.symbolic_rules import BROADCAST, SHAPES, broadcast

LIMIT = 4096
"""Integer tensors of more elements than this are data, not shapes."""


SAME = frozenset((
    "Softmax", "LayerNormalization", "RMSNormalization", "Gelu", "Erf", "Tanh", "Sigmoid",
    "Relu", "Sqrt", "Reciprocal", "Neg", "Exp", "Log", "Clip", "Cast", "Identity", "HardSwish",
    "Floor", "BatchNormalization", "Sin", "Cos", "Abs", "HardSigmoid", "LeakyRelu", "Elu", "Not",
    "Ceil", "Swish", "Mish", "Softplus", "LogSoftmax", "InstanceNormalization",
    "GroupNormalization", "CumSum", "Round", "Sign", "IsNaN", "IsInf", "QuickGelu",
    "LpNormalization", "Trilu", "Silu", "L2Normalization", "QuantizeLinear", "DequantizeLinear",
))  # fmt: skip
"""Ops whose first output has the shape of their first input."""

REDUCE = frozenset((
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
    "ReduceSumSquare", "ReduceLogSumExp",
))  # fmt: skip
INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


Dims = Sequence[int | ir.SymbolicDim]


class Symbolic:
    """Shapes and integer contents of the values of one graph.

    ``trust``: take what shape inference has said where no rule here tells a shape. Files hold
    shapes of the example they were traced with, which are not to be trusted. ``keep``: where a
    dynamic size meets a fixed one go on with the dynamic one, so that all ties are found.
    ``given``: dimensions of inputs, in place of those that the graph says.
    """

    def __init__(
        self,
        graph: ir.Graph,
        *,
        trust: bool = True,
        keep: bool = False,
        given: Mapping[ir.Value, Dims] | None = None,
    ) -> None:
        self.graph, self.trust, self.keep = graph, trust, keep
        self.given = given or {}
        self.shapes: dict[ir.Value, Shape] = {}
        self.data: dict[ir.Value, Data] = {}
        self.names: dict[str, Dim] = {}
        self.ties: list[Tie] = []

    def run(self) -> Symbolic:
        """Walk the graph once, in order."""
        for value in self.graph.inputs:
            shape = self.given.get(value, value.shape)
            if shape is not None:
                dims = [self.named(d) for d in shape]
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
            return as_data(shape[start:end])
        if kind == "Size":
            shape = self.shape(node.inputs[0])
            return None if shape is None else as_data(product_of(shape)).reshape(())
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
            return [broadcast([s for s in shapes if s is not None], self.keep)]
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
        return (tidy(limit - start),) if delta == 1 else None

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


def _is_decision(value: ir.Value) -> bool:
    """True for a constant of one integer or truth value: what a branch may be taken by."""
    array = constant(value)
    return array is not None and array.size == 1 and array.dtype.kind in "ib"


# --- shape rules --------------------------------------------------------------------------


def fold_shapes(graph: ir.Graph) -> int:
    """Write all shapes that can be told, and make constants of integers that no dynamic dimension
    has a part in; returns how many constants."""
    found = Symbolic(graph).run()
    for value, dims in found.shapes.items():
        if value.producer() is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else str(d) for d in dims])
    count, taken = 0, names_in(graph)
    for value, data in found.data.items():
        count += _fold(graph, value, data, taken)
    return count


def _fold(graph: ir.Graph, value: ir.Value, data: Data, taken: set[str]) -> bool:
    if value.is_graph_output() or not value.uses() or value.dtype not in INTEGERS:
        return False
    if not all(isinstance(x, (int, np.integer)) for x in data.ravel()):
        return False
    assert value.dtype is not None
    array = np.asarray(data.tolist(), value.dtype.numpy()).reshape(data.shape)
    value.replace_all_uses_with(new_constant(graph, f"{value.name}_folded", array, taken))
    return True
