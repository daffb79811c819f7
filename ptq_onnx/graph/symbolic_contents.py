"""The contents of small integer tensors, element by element, by the op that makes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy

from ptq_onnx.graph.symbolic_dims import Data, as_data, product_of, quotient, remainder, tidy


def _each(operation: Callable[..., Any]) -> Callable[[ir.Node, list[Data]], Data]:
    """An operation on elements, with ONNX's broadcasting."""

    def evaluate(_: ir.Node, inputs: list[Data]) -> Data:
        function = np.frompyfunc(lambda *a: tidy(operation(*a)), len(inputs), 1)
        return as_data(function(*inputs))

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
    found = as_data(np.frompyfunc(decide, len(inputs), 1)(*inputs))
    return None if any(x is None for x in found.ravel()) else found


def _relation(holds: Callable[[int], bool]) -> Callable[[ir.Node, list[Data]], Data | None]:
    return lambda _, inputs: _truths(lambda a, b: _sides(a, b, holds), inputs)


def _logic(operation: Callable[..., bool]) -> Callable[[ir.Node, list[Data]], Data | None]:
    return lambda _, inputs: _truths(lambda *a: operation(*map(bool, a)), inputs)


def _select(_: ir.Node, inputs: list[Data]) -> Data | None:
    if not all(isinstance(x, (bool, np.bool_, int)) for x in inputs[0].ravel()):
        return None
    return as_data(np.frompyfunc(lambda c, a, b: a if c else b, 3, 1)(*inputs))


def _gather(node: ir.Node, inputs: list[Data]) -> Data:
    axis = node.attributes.get_int("axis", 0)
    return as_data(np.take(inputs[0], inputs[1].astype(np.int64), axis=axis))


def _slice(node: ir.Node, inputs: list[Data]) -> Data:
    data, starts, ends = inputs[0], inputs[1].ravel(), inputs[2].ravel()
    axes = inputs[3].ravel() if len(inputs) > 3 else range(len(starts))
    steps = inputs[4].ravel() if len(inputs) > 4 else [1] * len(starts)
    index: list[slice] = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        ended = None if int(step) < 0 and int(end) < -data.shape[int(axis)] else int(end)
        index[int(axis)] = slice(int(start), ended, int(step))
    return as_data(data[tuple(index)])


def _concat(node: ir.Node, inputs: list[Data]) -> Data:
    return as_data(np.concatenate(inputs, axis=node.attributes.get_int("axis", 0)))


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
    return as_data(np.full([int(d) for d in inputs[0].ravel()], number, object))


def _multiplied(node: ir.Node, inputs: list[Data]) -> Data | None:
    if inputs[0].ndim != 1:
        return None
    keep = node.attributes.get_int("keepdims", 1)
    found = as_data(product_of(list(inputs[0])))
    return found.reshape((1,)) if keep else found.reshape(())


def _expanded(node: ir.Node, inputs: list[Data]) -> Data:
    shape = np.broadcast_shapes(inputs[0].shape, tuple(int(d) for d in inputs[1].ravel()))
    return as_data(np.broadcast_to(inputs[0], shape))


CONTENTS: dict[str, Callable[[ir.Node, list[Data]], Data | None]] = {
    "Identity": lambda _, inputs: inputs[0],
    "Add": _each(lambda a, b: a + b),
    "Sub": _each(lambda a, b: a - b),
    "Mul": _each(lambda a, b: a * b),
    "Div": _each(quotient),
    "Mod": _each(remainder),
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
