"""Residual streams: every op that adds to one, and every op that reads it.

A stream begins at the input of a norm and grows both ways: through the adds to the linears, the
convolution, the tables and tokens that write to it; through layout ops to the norms and linears
that read it; behind a norm to the linears that read that. It can be turned by an orthogonal
matrix where every one of them takes the matrix into its constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from ptq_onnx.blocks.channels import is_convolution
from ptq_onnx.blocks.walking import is_constant, is_linear, name_of
from ptq_onnx.equalization.channel_axis import (
    LINEAR_IN_CHANNELS,
    axis_before,
    axis_behind,
    channels_of,
)
from ptq_onnx.graph.formula import constant, scalar, sizes

READ_BY_SHAPE = frozenset(["Shape", "Size"])
KEEPING = frozenset(["LayerNormalization", "RMSNormalization"])
"""Norms that an orthogonal matrix with R·1 = 1 commutes with, without their γ and β."""


class Stays(Exception):
    """The stream cannot be turned; the text says why."""


class _Finer(Exception):
    """The channels are several pieces of ``width`` side by side (Swin's patch merging)."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.width = width


@dataclass
class Stream:
    """One residual stream of ``width`` channels, and what a matrix is folded into."""

    width: int
    axes: dict[ir.Value, int] = field(default_factory=dict)
    """Its tensors, and the axis of the channels in each."""
    behind: dict[ir.Value, tuple[int, ir.Node]] = field(default_factory=dict)
    """What norms make of it: the channels' axis, and the norm."""
    norms: list[ir.Node] = field(default_factory=list)
    writers: list[ir.Node] = field(default_factory=list)
    """Linears and convolutions whose outputs are in it."""
    scaled: list[tuple[ir.Node, ir.Node]] = field(default_factory=list)
    """Linears behind which a Mul by a factor per channel stands (LayerScale), with the Mul."""
    readers: list[tuple[ir.Node, ir.Node | None]] = field(default_factory=list)
    """Linears that read it, and the norm between."""
    constants: list[tuple[ir.Node, int, int]] = field(default_factory=list)
    """Constants in it: the node that reads one, the input's index, the channels' axis."""


@dataclass(frozen=True)
class Refused:
    """A stream that stays as it is, by its first norm, and why."""

    norm: str
    reason: str


def find_streams(graph: ir.Graph) -> tuple[list[Stream], list[Refused]]:
    """The streams that can be turned, in graph order, and those that cannot."""
    streams: list[Stream] = []
    refused: list[Refused] = []
    seen: set[ir.Value] = set()
    for node in graph:
        start = node.inputs[0] if node.op_type in KEEPING else None
        width = None if start is None else channels_of(start, len(sizes(start) or []) - 1)
        if start is None or width is None or start in seen:
            continue
        flood = _flooded(start, width)
        seen.update(flood.stream.axes)
        if flood.reason:
            if not any(r.reason == flood.reason for r in refused):
                refused.append(Refused(name_of(node), flood.reason))
        elif flood.stream.writers:
            streams.append(flood.stream)
    return streams, refused


def _flooded(start: ir.Value, width: int) -> _Flood:
    while True:
        flood = _Flood(Stream(width))
        try:
            flood.run(start)
        except Stays as stays:
            flood.reason = str(stays)
        except _Finer as finer:
            width = finer.width
            continue
        return flood


class _Flood:
    """Grows a stream from one of its tensors; raises Stays and _Finer."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.reason = ""
        self.pending: list[ir.Value] = []
        self.done: set[ir.Value] = set()
        self.joined: list[tuple[ir.Node, ir.Node]] = []

    def run(self, start: ir.Value) -> None:
        """Follow the channels of a stream from one of its tensors, both ways. Raises Stays where
        they cannot be turned."""
        self.take(start, len(sizes(start) or []) - 1)
        while self.pending:
            value = self.pending.pop()
            axis = self.stream.axes[value]
            if value.is_graph_output():
                raise Stays(f"'{value.name}' is an output of the model")
            self.made(value, axis)
            for use in value.uses():
                self.read(use.node, use.idx, value, axis)
        for node, norm in self.joined:
            parts = [self.stream.behind.get(v, (0, None))[1] for v in node.inputs if v is not None]
            if any(part is not norm for part in parts):
                raise Stays(f"'{name_of(node)}' joins what '{name_of(norm)}' makes with other data")

    def take(self, value: ir.Value | None, axis: int | None, by: ir.Node | None = None) -> None:
        """``value`` is in the stream, its channels along ``axis``."""
        size = None if value is None or axis is None else channels_of(value, axis)
        if value is None or axis is None or size is None:
            raise Stays(f"the channels cannot be followed through '{name_of(by)}'" if by else "")
        if size % self.stream.width:
            raise Stays(f"'{value.name}' has {size} channels, others {self.stream.width}")
        if self.stream.axes.setdefault(value, axis) != axis or value in self.stream.behind:
            raise Stays(f"'{value.name}' mixes channels with others")
        if value not in self.done:
            self.done.add(value)
            self.pending.append(value)

    # --- backwards ----------------------------------------------------------------------

    def made(self, value: ir.Value, axis: int) -> None:
        """Whatever makes a tensor of the stream."""
        node = value.producer()
        if node is None:
            raise Stays(f"'{value.name}' is an input of the model")
        if is_linear(node) and axis == len(sizes(value) or []) - 1:
            self.write(node)
        elif is_convolution(node) and axis == 1:
            if node.attributes.get_int("group", 1) != 1:
                raise Stays(f"'{name_of(node)}' is a convolution in the stream")
            self.write(node)
        elif node.op_type in LINEAR_IN_CHANNELS:
            self.inputs(node, axis)
        elif node.op_type in KEEPING:
            raise Stays(f"the output of the norm '{name_of(node)}' is added to the stream")
        else:
            raise Stays(f"'{name_of(node)}' ({node.op_type}) makes a part of it")

    def write(self, node: ir.Node) -> None:
        """Note a linear that writes the stream. Raises Stays where its weight is computed."""
        if not all(v is None or is_constant(v) for v in node.inputs[1:]):
            raise Stays(f"the weight of '{name_of(node)}' is no constant")
        if node not in self.stream.writers:
            self.stream.writers.append(node)

    def inputs(self, node: ir.Node, axis: int) -> None:
        """The data of an op whose output is in the stream is in it too."""
        if node.op_type in ("Mul", "Div"):
            self.factor(node, axis)
            return
        if node.op_type == "Concat" and self._along(node, axis):
            parts = [channels_of(v, axis) for v in node.inputs]
            least = min((p for p in parts if p), default=self.stream.width)
            if least < self.stream.width and all(p and p % least == 0 for p in parts):
                raise _Finer(least)
        count = len(node.inputs) if node.op_type in ("Add", "Sub", "Concat") else 1
        for index in range(count):
            self.operand(node, index, axis)

    def operand(self, node: ir.Node, index: int, axis: int) -> None:
        """Note the other input of an op on the stream: a part of the stream, a constant with its
        channels, or one value for all channels, which a rotation leaves alone."""
        value = node.inputs[index]
        if value is None:
            return
        before = axis_before(node, index, axis, self.stream.width)
        if node.op_type in ("Add", "Sub") and self._alike(value, axis, node):
            return  # the same for all channels: R·1 = 1
        if not is_constant(value):
            self.take(value, before, node)
            return
        array = constant(value)
        if array is None or before is None or array.shape[before] % self.stream.width:
            raise Stays(f"the constant '{value.name}' has other channels")
        self.stream.constants.append((node, index, before))

    @staticmethod
    def _alike(value: ir.Value, axis: int, node: ir.Node) -> bool:
        """True for an operand that is broadcast along the channels."""
        shape, whole = sizes(value), sizes(node.outputs[0])
        if shape is None or whole is None:
            return False
        own = axis - (len(whole) - len(shape))
        return own < 0 or shape[own] == 1

    def factor(self, node: ir.Node, axis: int) -> None:
        """A Mul or Div by one number, or by a factor per channel right behind a linear."""
        data = [i for i, v in enumerate(node.inputs) if not is_constant(v)]
        if len(data) != 1 or (node.op_type == "Div" and data != [0]):
            raise Stays(f"'{name_of(node)}' multiplies two tensors")
        value, other = node.inputs[data[0]], node.inputs[1 - data[0]]
        assert value is not None
        if scalar(other) is not None:
            self.take(value, axis_before(node, data[0], axis, self.stream.width), node)
            return
        linear = value.producer()
        last = len(sizes(value) or []) - 1
        array = constant(other)
        if (
            linear is None
            or not is_linear(linear)
            or axis != last
            or array is None
            or array.size != channels_of(value, last)
            or len(value.uses()) != 1
            or node.op_type != "Mul"
        ):
            raise Stays(f"'{name_of(node)}' multiplies each channel by another factor")
        self.stream.scaled.append((linear, node))

    @staticmethod
    def _along(node: ir.Node, axis: int) -> bool:
        rank = len(sizes(node.outputs[0]) or [1])
        return node.attributes.get_int("axis", 0) % rank == axis

    # --- forwards -----------------------------------------------------------------------

    def read(self, node: ir.Node, index: int, value: ir.Value, axis: int) -> None:
        """An op that reads a tensor of the stream."""
        last = axis == len(sizes(value) or []) - 1
        if node.op_type in READ_BY_SHAPE:
            return
        if node.op_type in KEEPING and index == 0:
            self.norm(node, value, axis)
        elif is_linear(node) and index == 0 and last:
            if (node, None) not in self.stream.readers:
                self.stream.readers.append((node, None))
        elif node.op_type in LINEAR_IN_CHANNELS and (index == 0 or self._data(node)):
            along = node.op_type == "Concat" and self._along(node, axis)
            if node.op_type in ("Mul", "Div") and not self._by_scalar(node, index):
                raise Stays(f"'{name_of(node)}' multiplies each channel by another factor")
            after = axis if along else axis_behind(node, index, axis, self.stream.width)
            for output in node.outputs:
                if output.uses() or output.is_graph_output():
                    self.take(output, after, node)
        else:
            raise Stays(f"'{name_of(node)}' ({node.op_type}) reads it")

    @staticmethod
    def _data(node: ir.Node) -> bool:
        return node.op_type in ("Add", "Sub", "Mul", "Div", "Concat")

    @staticmethod
    def _by_scalar(node: ir.Node, index: int) -> bool:
        other = node.inputs[1 - index]
        return scalar(other) is not None and (node.op_type == "Mul" or index == 0)

    def norm(self, node: ir.Node, value: ir.Value, axis: int) -> None:
        """Note a norm that reads the stream, and the linears behind it. Raises Stays."""
        rank = len(sizes(value) or [])
        over = node.attributes.get_int("axis", -1) % rank
        if over != axis or axis != rank - 1:
            raise Stays(f"the norm '{name_of(node)}' is over other axes than the channels")
        if not all(v is None or _of_channels(v, norm_width(node)) for v in node.inputs[1:]):
            raise Stays(f"γ or β of '{name_of(node)}' is not a constant for each channel")
        self.stream.norms.append(node)
        for reader in self.linears_behind(node.outputs[0], axis, node):
            self.stream.readers.append((reader, node))

    def linears_behind(self, value: ir.Value, axis: int, norm: ir.Node) -> Iterator[ir.Node]:
        """The linears that read a norm's output, all through ops that treat channels alike."""
        known = self.stream.behind.setdefault(value, (axis, norm))
        if value in self.stream.axes or known != (axis, norm):
            raise Stays(f"'{value.name}' mixes channels with others")
        if value.is_graph_output():
            raise Stays(f"'{value.name}', behind the norm '{name_of(norm)}', is an output")
        last = axis == len(sizes(value) or []) - 1
        whole = channels_of(value, axis)
        for use in value.uses():
            node = use.node
            if node.op_type in READ_BY_SHAPE:
                continue
            if is_linear(node) and use.idx == 0 and last and whole == norm_width(norm):
                yield node
                continue
            moves = node.op_type in LINEAR_IN_CHANNELS and not self._data(node)
            if node.op_type == "Concat" and not self._along(node, axis):
                self.joined.append((node, norm))
                moves = True
            after = axis_behind(node, use.idx, axis, self.stream.width) if moves else None
            if after is None or (node.op_type == "Pad" and has_shift(norm)):
                raise Stays(f"'{name_of(node)}' ({node.op_type}) reads the norm '{name_of(norm)}'")
            if node.op_type == "ReduceSum" and has_shift(norm):
                raise Stays(f"'{name_of(node)}' adds up what '{name_of(norm)}' makes")
            for output in node.outputs:
                if output not in self.stream.behind:
                    yield from self.linears_behind(output, after, norm)


def norm_width(norm: ir.Node) -> int | None:
    """How many channels a norm takes together."""
    return channels_of(norm.inputs[0], len(sizes(norm.inputs[0]) or []) - 1)


def _of_channels(value: ir.Value, width: int | None) -> bool:
    """True for a constant [D], or one with only ones in front of D."""
    array = constant(value)
    return array is not None and array.ndim > 0 and array.size == array.shape[-1] == width


def has_shift(norm: ir.Node) -> bool:
    """True for a norm with a β that is not zero."""
    shift = constant(norm.inputs[2]) if len(norm.inputs) > 2 else None
    return shift is not None and bool(shift.any())
