"""Dimensions as integers or polynomials in the named ones of the inputs, which are positive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
from numpy.typing import NDArray
from sympy.polys.polyerrors import BasePolynomialError

Dim = Any
"""An int, or a sympy expression in positive integer symbols."""


Shape = tuple[Dim, ...]


Data = NDArray[np.object_]


UNTOLD = (ValueError, IndexError, TypeError, ArithmeticError, BasePolynomialError)
"""What a rule raises where a shape or a content cannot be told."""


@dataclass(frozen=True)
class Tie:
    """A dynamic size that must be a fixed one for a node to run, by the value that fixes it."""

    size: Dim
    fixed: int
    by: ir.Value
    split: tuple[int, ...] = ()
    """Into what a Reshape cuts it: a hint, for it may also cut the batch."""


def dynamic_names(dim: Dim) -> list[str]:
    """The dynamic dimensions that an expression depends on."""
    return sorted(s.name for s in dim.free_symbols) if isinstance(dim, sympy.Basic) else []


def as_data(items: Any) -> Data:
    """The items as an array of objects, which holds numbers and expressions alike."""
    array = np.empty(np.shape(items), dtype=object)
    array[...] = items
    return array


def tidy(value: Any) -> Dim:
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


def product_of(dims: Sequence[Dim]) -> Dim:
    """The product of dimensions; 1 of none."""
    total: Dim = 1
    for dim in dims:
        total = total * dim
    return tidy(total)


def quotient(total: Dim, part: Dim) -> Dim:
    """Integer division of positive dimensions; exact wherever the division is."""
    if isinstance(total, int) and isinstance(part, int):
        return total // part if (total >= 0) == (part > 0) else -((-total) // part)
    if isinstance(total, float) or isinstance(part, float):
        return total / part
    ratio = sympy.expand(sympy.cancel(sympy.sympify(total) / part))
    if not ratio.is_integer:
        ratio = sympy.floor(ratio)
    return tidy(ratio)


def remainder(value: Dim, by: Dim) -> Dim:
    """value − ⌊value / by⌋ · by, of positive dimensions."""
    if isinstance(value, int) and isinstance(by, int):
        return value % by
    return tidy(value - quotient(value, by) * by)
