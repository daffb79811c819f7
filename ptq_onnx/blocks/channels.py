"""Channels of tensors and weights: which entry of a per-channel array is for which of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.element_map import layout_indices, static_shape
from ptq_onnx.blocks.walking import is_constant, is_linear

Factor = NDArray[np.float32]


def is_power_of_two(factor: Factor) -> bool:
    """True where every entry is a power of two, so that multiplying by it is exact."""
    mantissa, _ = np.frexp(factor)
    return bool(np.all(mantissa == 0.5))


def cancels(one: Factor, other: Factor) -> bool:
    """True where the factors' products are all one (within float32 rounding)."""
    return bool(np.all(np.abs(one.astype(np.float64) * other - 1) < 1e-6))


def is_convolution(node: ir.Node) -> bool:
    """True for a Conv whose weight, and bias if it has one, are constants."""
    return node.op_type == "Conv" and all(is_constant(v) for v in node.inputs[1:])


def rows_in_weight(node: ir.Node, rows: Factor) -> Factor:
    """A factor per input channel [C] in the shape in which it divides the weight: [C, 1] of a
    linear, [N, C/groups, 1, …] of a convolution."""
    weight = node.inputs[1]
    if is_linear(node) or weight is None or weight.shape is None:
        return rows.reshape(-1, 1)
    outputs, inside = (int(d) for d in list(weight.shape)[:2] if isinstance(d, int))
    group = np.arange(outputs) // (outputs // node.attributes.get_int("group", 1))
    index = group[:, None] * inside + np.arange(inside)
    shape = (outputs, inside, *[1] * (len(weight.shape) - 2))
    return np.asarray(rows[index].reshape(shape), np.float32)


def own_channels(value: ir.Value, factor: Factor, axis: int) -> NDArray[np.int64] | None:
    """The channels of ``value`` along ``axis`` that the entries of a factor are for, in its
    shape; None for a factor of something else."""
    rank = factor.ndim if value.shape is None else len(value.shape)
    padded = (1,) * (rank - factor.ndim) + factor.shape
    if factor.ndim == 0 or factor.ndim > rank or padded[axis] != factor.size:
        return None
    return np.arange(factor.size, dtype=np.int64).reshape(factor.shape)


def rows_of(value: ir.Value, read: ir.Value, factor: Factor, axis: int = -1) -> Factor | None:
    """The factor of ``value`` per channel (along ``axis``) of ``read``, behind layout ops.

    None where a channel of ``read`` mixes several factors.
    """
    if value is read:
        return None if own_channels(read, factor, axis) is None else factor.reshape(-1)
    indices = layout_indices(value, read)
    shape = static_shape(value)
    if indices is None or shape is None:
        return None
    indices = np.moveaxis(indices, axis, -1)
    values = np.broadcast_to(factor, shape).ravel()[indices.reshape(-1, indices.shape[-1])]
    return values[0] if bool(np.all(values == values[0])) else None
