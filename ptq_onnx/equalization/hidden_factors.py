"""Factors for the hidden channels of an MLP: one Mul behind the activation function, undone in the
rows that read it; channels far above the rest are copied, and each copy counts in part.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.equalization.factor_search import Choice, Product, Records, choose_factor
from ptq_onnx.equalization.foldings import Hidden
from ptq_onnx.numerics.ptf import least_steps

Double = NDArray[np.float64]

COPIES = (16, 32, 64)
"""Numbers of channels that copies may add to the hidden ones of an MLP …"""
MOST_COPIES = 1 / 8
"""… up to this part of them."""


def unshifted(low: Double, high: Double, levels: int, *, symmetric: bool) -> Double:
    """Half of the range [C] that channels take up where all share one zero point."""
    limits = (-(levels // 2), levels // 2 - 1) if symmetric else (0, levels - 1)
    _, step = least_steps(low, high, limits, symmetric)
    return np.asarray(step * (levels - 1) / 2)


def choose_hidden_factor(
    hidden: Hidden | None,
    bounds: tuple[Double, Double],
    variance: Double,
    products: list[Product],
    levels: int,
    records: Records | None = None,
) -> Choice:
    """The factors [C] of channels with those lowest and highest values, and copies [C] where there
    is a ``hidden`` layer to widen; see :func:`choose_factor`."""
    numbers = tuple(n for n in COPIES if n <= len(variance) * MOST_COPIES)
    return choose_factor(
        unshifted(*bounds, levels, symmetric=False),
        variance,
        products,
        levels,
        extra=() if hidden is None else numbers,
        records=records,
    )


def with_copies(
    graph: ir.Graph, hidden: Hidden | None, choice: Choice
) -> tuple[Double, NDArray[np.int64]]:
    """Copy channels as was chosen, in place: the factor of every channel then, and which of the
    channels before it is."""
    factor, index = choice.factor, np.arange(len(choice.factor))
    if hidden is None or choice.copies is None:
        return factor, index
    hidden.repeat(graph, choice.copies)
    index = np.repeat(index, choice.copies)
    # Each copy holds the whole value: its part is taken with the factor.
    return (factor * choice.copies)[index], index
