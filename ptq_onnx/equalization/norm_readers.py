"""What reads a norm of a turned stream: what takes the matrix in, and what wants it as it was.

Linears and convolutions take Rᵀ diag(γ) into their weights and β into their biases. Where zeros
are padded in between, or pixels lie unevenly under a kernel, β is no bias: then the norm keeps
(β/γ) R and the weights take diag(γ) alone. For anything else one linear brings γ, β and the old
channels back, as late on the way as all channels are together.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ptq_onnx.blocks.walking import is_constant, is_linear
from ptq_onnx.equalization.channel_axis import (
    LINEAR_IN_CHANNELS,
    along_channels,
    axis_behind,
    channels_of,
    is_arithmetic,
)
from ptq_onnx.equalization.padding import pads_of
from ptq_onnx.graph.formula import constant, scalar, sizes

READ_BY_SHAPE = frozenset(["Shape", "Size"])
LARGEST_SHIFT = 1.0
"""Root mean square of β/γ that a norm may keep: as large as what it makes without."""

Uses = frozenset[tuple[ir.Node, int]]
"""Nodes that read a tensor, with the input's index."""


@dataclass
class Behind:
    """All that a norm's output reaches through ops that treat channels alike."""

    axes: dict[ir.Value, int] = field(default_factory=dict)
    """The tensors, and the axis of the channels in each."""
    readers: dict[ir.Node, None] = field(default_factory=dict)
    joins: dict[ir.Node, None] = field(default_factory=dict)
    """Concats along other axes, whose other inputs have to be the same norm's."""
    restored: dict[ir.Value, Uses] = field(default_factory=dict)
    """Tensors that something wants as they were, with the uses that take them turned."""
    keeps_shift: bool = False

    def add(self, other: Behind) -> None:
        """The other's too."""
        self.axes.update(other.axes)
        self.readers.update(other.readers)
        self.joins.update(other.joins)
        self.restored.update(other.restored)
        self.keeps_shift |= other.keeps_shift


def behind_norm(norm: ir.Node, axis: int, width: int, apart: Collection[ir.Node]) -> Behind:
    """What reads the norm's output, channels along ``axis`` in pieces of ``width``; the ops
    ``apart`` want it as it was."""
    found = _Walk(norm, width, apart).follow(norm.outputs[0], axis)
    assert found is not None
    return found


class _Walk:
    def __init__(self, norm: ir.Node, width: int, apart: Collection[ir.Node]) -> None:
        self.norm, self.width, self.apart = norm, width, apart
        self.whole = norm_width(norm)
        self.shifted = has_shift(norm)
        self.may_keep = not self.shifted or _small_shift(norm)

    def follow(self, value: ir.Value, axis: int) -> Behind | None:
        """None where something wants ``value`` as it was and its channels are not in rows."""
        found = Behind({value: axis})
        taken: set[tuple[ir.Node, int]] = set()
        uses = [(use.node, use.idx) for use in value.uses()]
        for node, index in uses:
            part = self.use(node, index, value, axis)
            if part is not None:
                taken.add((node, index))
                found.add(part)
        if len(taken) < len(uses) or value.is_graph_output():
            last = axis == len(sizes(value) or []) - 1
            if not last or channels_of(value, axis) != self.whole:
                return None
            found.restored[value] = frozenset(taken)
        return found

    def use(self, node: ir.Node, index: int, value: ir.Value, axis: int) -> Behind | None:
        """Through one op that reads ``value``; None where it wants that as it was."""
        if node.op_type in READ_BY_SHAPE:
            return Behind()
        if node in self.apart:
            return None
        if reads_channels(node, index, axis, value) and channels_of(value, axis) == self.whole:
            return self.kept(Behind(readers={node: None}), needed=not adds_shift(node))
        return self.passed(node, index, axis)

    def passed(self, node: ir.Node, index: int, axis: int) -> Behind | None:
        """Through an op that treats channels alike."""
        if node.op_type not in LINEAR_IN_CHANNELS or is_arithmetic(node):
            return None
        found = Behind()
        if node.op_type == "Concat":
            if along_channels(node, axis):
                return None
            found.joins[node] = None
        if node.op_type == "Pad" and not pads_zeros(node):
            return None
        after = axis_behind(node, index, axis, self.width)
        if after is None:
            return None
        for output in node.outputs:
            part = self.follow(output, after)
            if part is None:
                return None
            found.add(part)
        uneven = node.op_type == "ReduceSum" or (node.op_type == "Pad" and by_constant(node))
        return self.kept(found, needed=uneven)

    def kept(self, found: Behind, *, needed: bool) -> Behind | None:
        """``found``, for which the norm keeps its β; None where that is too large."""
        if not needed or not self.shifted:
            return found
        found.keeps_shift = True
        return found if self.may_keep else None


def reads_channels(node: ir.Node, index: int, axis: int, value: ir.Value) -> bool:
    """True for a linear or a convolution, not in groups, of the channels along ``axis``."""
    if index != 0:
        return False
    if is_linear(node):
        return axis == len(sizes(value) or []) - 1
    if node.op_type not in ("Conv", "ConvTranspose") or axis != 1:
        return False
    return node.attributes.get_int("group", 1) == 1 and all(map(is_constant, node.inputs[1:]))


def adds_shift(node: ir.Node) -> bool:
    """True where a shift of the input is one of the output, the same at every place."""
    return is_linear(node) or (node.op_type == "Conv" and pads_of(node) == 0)


def by_constant(pad: ir.Node) -> bool:
    """True for a Pad that puts a number around, not what is there already."""
    return pad.attributes.get_string("mode", "constant") == "constant"


def pads_zeros(pad: ir.Node) -> bool:
    """True for a Pad that puts zeros, or what is there already, around."""
    value = pad.inputs[2] if len(pad.inputs) > 2 else None
    return not by_constant(pad) or value is None or scalar(value) == 0


def norm_width(norm: ir.Node) -> int | None:
    """How many channels a norm takes together."""
    return channels_of(norm.inputs[0], len(sizes(norm.inputs[0]) or []) - 1)


def has_shift(norm: ir.Node) -> bool:
    """True for a norm with a β that is not zero."""
    shift = constant(norm.inputs[2]) if len(norm.inputs) > 2 else None
    return shift is not None and bool(shift.any())


def _small_shift(norm: ir.Node) -> bool:
    """Whether β/γ is no larger than what the norm makes."""
    scale, shift = constant(norm.inputs[1]), constant(norm.inputs[2])
    if scale is None or shift is None:
        return False
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.nan_to_num(shift.astype(np.float64) / scale.astype(np.float64), nan=0.0)
    return bool(np.abs(ratio).max() < 1e6 and np.sqrt(np.mean(ratio**2)) <= LARGEST_SHIFT)
