"""Reads constants and formulas off the graph: what a value is, as arithmetic on another."""

from __future__ import annotations

from functools import reduce

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

DOMAIN = "ptq_onnx"
"""The domain of the fused ops that standard ONNX does not have."""

Polynomial = dict[tuple[int, ...], float]
"""The coefficient of each product of powers, one power for each variable."""

TOLERANCE = 2e-4
"""Relative; exporters cut constants off after some digits (√2 = 1.4142)."""


def constant(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The array of an initializer or a Constant node; None for anything else."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number a constant of one element holds; None for anything else."""
    array = constant(value)
    return None if array is None or array.size != 1 else float(array.reshape(-1)[0])


def sizes(value: ir.Value | None) -> list[int | str] | None:
    """The dimensions, static as int and dynamic by name; None where one is unknown."""
    if value is None or value.shape is None:
        return None
    dims: list[int | str] = []
    for dim in value.shape:
        name = dim if isinstance(dim, int) else dim.value
        if name is None:
            return None
        dims.append(name)
    return dims


def unique_name(graph: ir.Graph, name: str, taken: set[str] | None = None) -> str:
    """``name``, with a number behind it where a value of the graph has it.

    ``taken``: the names of all values, where many are asked for; the new one comes to them.
    """
    result, count = name, 1
    while _is_taken(graph, result) if taken is None else result in taken:
        result, count = f"{name}_{count}", count + 1
    if taken is not None:
        taken.add(result)
    return result


def names_in(graph: ir.Graph) -> set[str]:
    """The names of all values."""
    values = [*graph.inputs, *graph.initializers.values()]
    values += [v for node in graph for v in node.outputs]
    return {str(v.name) for v in values} | set(graph.initializers)


def _is_taken(graph: ir.Graph, name: str) -> bool:
    """Whether a value has the name: quicker for a single one than a set of all."""
    if name in graph.initializers or any(v.name == name for v in graph.inputs):
        return True
    for node in graph:
        for value in node.outputs:
            if value.name == name:
                return True
    return False


def new_constant(
    graph: ir.Graph, name: str, array: NDArray[np.generic], taken: set[str] | None = None
) -> ir.Value:
    """A new initializer, its name made unique (``taken``: see :func:`unique_name`)."""
    name = unique_name(graph, name, taken)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name,
        const_value=tensor,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
    )
    graph.register_initializer(value)
    return value


def is_private(value: ir.Value) -> bool:
    """True for a value with one reader that is not an output of the graph."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def polynomial(
    value: ir.Value | None, variables: tuple[ir.Value, ...], *, is_root: bool = False
) -> Polynomial | None:
    """``value`` as a polynomial in the variables, however it is spelled; None where it is none.

    Follows Add, Sub, Mul, Neg, Div by a constant and Pow by 1, 2 or 3. A result on the way
    that is also read elsewhere ends the search: it is not free to be fused. The root itself is.
    """
    for i, variable in enumerate(variables):
        if value is variable:
            return {tuple(int(i == j) for j in range(len(variables))): 1.0}
    one = (0,) * len(variables)
    number = scalar(value)
    if number is not None:
        return {one: number}
    node = None if value is None else value.producer()
    if value is None or node is None or not (is_root or _read_by_one_node(value)):
        return None
    if node.op_type not in ("Neg", "Add", "Sub", "Mul", "Div", "Pow"):
        return None
    operands = [polynomial(v, variables) for v in node.inputs]
    left, right = operands[0], {one: -1.0} if node.op_type == "Neg" else operands[1]
    if left is None or right is None:
        return None
    if node.op_type == "Add":
        return _sum(left, right)
    if node.op_type == "Sub":
        return _sum(left, _product(right, {one: -1.0}))
    if node.op_type in ("Mul", "Neg"):
        return _product(left, right)
    if set(right) != {one}:
        return None
    if node.op_type == "Div":
        return _product(left, {one: 1.0 / right[one]}) if right[one] else None
    if right[one] not in (1, 2, 3):
        return None
    return reduce(_product, [left] * int(right[one]))


def is_polynomial(found: Polynomial | None, expected: Polynomial) -> bool:
    """The same powers with the same coefficients, to the digits exporters keep."""
    if found is None:
        return False
    powers = {p: c for p, c in found.items() if c != 0.0}
    return powers.keys() == expected.keys() and all(
        abs(powers[p] - c) <= TOLERANCE * abs(c) for p, c in expected.items()
    )


def _read_by_one_node(value: ir.Value) -> bool:
    """True where only one node reads the value, perhaps twice (``Mul(x, x)``)."""
    return len({use.node for use in value.uses()}) == 1 and not value.is_graph_output()


def _sum(left: Polynomial, right: Polynomial) -> Polynomial:
    return {p: left.get(p, 0.0) + right.get(p, 0.0) for p in left.keys() | right.keys()}


def _product(left: Polynomial, right: Polynomial) -> Polynomial:
    product: Polynomial = {}
    for p, a in left.items():
        for q, b in right.items():
            powers = tuple(i + j for i, j in zip(p, q, strict=True))
            product[powers] = product.get(powers, 0.0) + a * b
    return product
