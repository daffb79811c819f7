"""Residual streams: every op that adds to one, and every op that reads it.

A stream begins at the input of a norm and grows both ways: through the adds to the linears, the
convolution, the tables and tokens that write to it; through layout ops to the norms, linears and
convolutions that read it; behind a norm to those that read that (``norm_readers.py``). It can be
turned by an orthogonal matrix where every one of them takes the matrix into its constants. An op
that cannot stands apart: one product turns what it makes, another turns back what it reads. Where
these would be more than ``MOST_ADDED`` of the stream's own products, it stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ptq_onnx.blocks.channels import is_convolution
from ptq_onnx.blocks.walking import is_constant, is_linear, name_of
from ptq_onnx.equalization.channel_axis import (
    LINEAR_IN_CHANNELS,
    along_channels,
    axis_before,
    axis_behind,
    channels_of,
    is_arithmetic,
)
from ptq_onnx.equalization.norm_readers import (
    READ_BY_SHAPE,
    Uses,
    behind_norm,
    norm_width,
    reads_channels,
)
from ptq_onnx.equalization.stream_parts import Stream
from ptq_onnx.graph.formula import constant, scalar, sizes

KEEPING = frozenset(["LayerNormalization", "RMSNormalization"])
"""Norms that an orthogonal matrix with R·1 = 1 commutes with, without their γ and β."""
MOST_ADDED = 0.05
"""Products that may be added, as a part of those of the linears of the stream."""
MOST_APART = 16
"""Ops that may stand apart."""


class Stays(Exception):
    """The stream cannot be turned; the text says why."""


class _Apart(Exception):
    """An op that cannot take the matrix in; the text says why."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


class _Finer(Exception):
    """The channels are several pieces of ``width`` side by side (Swin's patch merging)."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.width = width


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
    apart: dict[ir.Node, str] = {}
    while True:
        flood = _Flood(Stream(width), apart)
        try:
            flood.run(start)
        except Stays as stays:
            flood.reason = str(stays)
        except _Apart as found:
            if found.node in apart or len(apart) == MOST_APART:
                flood.reason = next(iter(apart.values()), str(found))
            else:
                apart[found.node] = str(found)
                continue
        except _Finer as finer:
            width = finer.width
            continue
        return flood


class _Flood:
    """Grows a stream from one of its tensors; raises Stays, _Apart and _Finer."""

    def __init__(self, stream: Stream, apart: dict[ir.Node, str]) -> None:
        self.stream, self.apart = stream, apart
        self.reason = ""
        self.pending: list[ir.Value] = []
        self.done: set[ir.Value] = set()
        self.joined: list[tuple[ir.Node, ir.Node]] = []
        self.wanted: list[str] = []
        """Why a product is added, in words."""

    def run(self, start: ir.Value) -> None:
        """Follow the channels of a stream from one of its tensors, both ways. Raises Stays where
        they cannot be turned."""
        self.take(start, len(sizes(start) or []) - 1)
        while self.pending:
            value = self.pending.pop()
            self.visit(value, self.stream.axes[value])
        for node, norm in self.joined:
            parts = [self.stream.behind.get(v, (0, None))[1] for v in node.inputs if v is not None]
            if any(part is not norm for part in parts):
                raise _Apart(
                    node, f"'{name_of(node)}' joins what '{name_of(norm)}' makes with other data"
                )
        if not self.stream.products:
            return
        reason = [*self.apart.values(), *self.wanted][0]
        if not self.stream.readers:
            raise Stays(reason)
        if self.stream.added > MOST_ADDED:
            raise Stays(
                f"{reason}; products for that ({len(self.stream.products)}) would add"
                f" {self.stream.added:.0%} to its own, more than {MOST_ADDED:.0%}"
            )

    def visit(self, value: ir.Value, axis: int) -> None:
        """What makes a tensor of the stream, and all that read it."""
        node = value.producer()
        if node is None:
            raise Stays(f"'{value.name}' is an input of the model")
        try:
            if node in self.apart or node.op_type in KEEPING:
                self.enter(value, axis, node)
            else:
                self.made(node, value, axis)
        except Stays as stays:
            raise _Apart(node, str(stays)) from stays
        taken: set[tuple[ir.Node, int]] = set()
        uses = [(use.node, use.idx) for use in value.uses()]
        for reader, index in uses:
            if reader in self.apart:
                continue
            try:
                self.read(reader, index, value, axis)
            except Stays as stays:
                raise _Apart(reader, str(stays)) from stays
            taken.add((reader, index))
        if value in self.stream.entered:
            self.stream.entered[value] = frozenset(taken)
        if value.is_graph_output():
            self.wanted.append(f"'{value.name}' is an output of the model")
        if len(taken) < len(uses) or value.is_graph_output():
            self.rows(value, axis)
            self.stream.restored[value] = (None, frozenset(taken))

    def rows(self, value: ir.Value, axis: int) -> None:
        """A product can be put behind a tensor whose channels are its rows."""
        if axis != len(sizes(value) or []) - 1 or channels_of(value, axis) != self.stream.width:
            reason = next(iter(self.apart.values()), f"'{value.name}' is wanted as it was")
            raise Stays(f"{reason}, where the channels are not the last axis")

    def enter(self, value: ir.Value, axis: int, node: ir.Node) -> None:
        """A tensor of the stream that an op makes which cannot take the matrix in."""
        self.rows(value, axis)
        self.stream.entered[value] = frozenset()
        if node not in self.apart:
            self.wanted.append(f"the output of the norm '{name_of(node)}' is added to the stream")

    def take(self, value: ir.Value | None, axis: int | None, by: ir.Node | None = None) -> None:
        """``value`` is in the stream, its channels along ``axis``."""
        if value is None or axis is None or (size := channels_of(value, axis)) is None:
            raise Stays(f"the channels cannot be followed through '{name_of(by)}'" if by else "")
        if size % self.stream.width:
            raise Stays(f"'{value.name}' has {size} channels, others {self.stream.width}")
        if self.stream.axes.setdefault(value, axis) != axis or value in self.stream.behind:
            raise Stays(f"'{value.name}' mixes channels with others")
        if value not in self.done:
            self.done.add(value)
            self.pending.append(value)

    # --- backwards ----------------------------------------------------------------------

    def made(self, node: ir.Node, value: ir.Value, axis: int) -> None:
        """The op that makes a tensor of the stream."""
        if is_linear(node) and axis == len(sizes(value) or []) - 1:
            self.write(node)
        elif is_convolution(node) and axis == 1:
            if node.attributes.get_int("group", 1) != 1:
                raise Stays(f"'{name_of(node)}' is a convolution in the stream")
            self.write(node)
        elif node.op_type in LINEAR_IN_CHANNELS:
            self.inputs(node, axis)
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
        if node.op_type == "Concat" and along_channels(node, axis):
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
        if scalar(other) is not None or self._alike_factor(other, axis, node):
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

    # --- forwards -----------------------------------------------------------------------

    def read(self, node: ir.Node, index: int, value: ir.Value, axis: int) -> None:
        """An op that reads a tensor of the stream."""
        if node.op_type in READ_BY_SHAPE:
            return
        if node.op_type in KEEPING and index == 0:
            self.norm(node, value, axis)
        elif reads_channels(node, index, axis, value):
            if (node, None) not in self.stream.readers:
                self.stream.readers.append((node, None))
        elif node.op_type in LINEAR_IN_CHANNELS and (
            index == 0 or is_arithmetic(node) or node.op_type == "Concat"
        ):
            along = node.op_type == "Concat" and along_channels(node, axis)
            if node.op_type in ("Mul", "Div") and not self._by_scalar(node, index, axis):
                raise Stays(f"'{name_of(node)}' multiplies each channel by another factor")
            after = axis if along else axis_behind(node, index, axis, self.stream.width)
            for output in node.outputs:
                if output.uses() or output.is_graph_output():
                    self.take(output, after, node)
        else:
            raise Stays(f"'{name_of(node)}' ({node.op_type}) reads it")

    def _by_scalar(self, node: ir.Node, index: int, axis: int) -> bool:
        other = node.inputs[1 - index]
        found = scalar(other) is not None or self._alike_factor(other, axis, node)
        return found and (node.op_type == "Mul" or index == 0)

    def _alike_factor(self, other: ir.Value | None, axis: int, node: ir.Node) -> bool:
        """True for constant factors that are the same for all channels, as those of tokens."""
        return is_constant(other) and other is not None and self._alike(other, axis, node)

    def norm(self, node: ir.Node, value: ir.Value, axis: int) -> None:
        """Note a norm that reads the stream, and the linears behind it. Raises Stays."""
        rank = len(sizes(value) or [])
        over = node.attributes.get_int("axis", -1) % rank
        if over != axis or axis != rank - 1:
            raise Stays(f"the norm '{name_of(node)}' is over other axes than the channels")
        if not all(v is None or _of_channels(v, norm_width(node)) for v in node.inputs[1:]):
            raise Stays(f"γ or β of '{name_of(node)}' is not a constant for each channel")
        self.stream.norms.append(node)
        found = behind_norm(node, axis, self.stream.width, self.apart.keys())
        for tensor, where in found.axes.items():
            known = self.stream.behind.setdefault(tensor, (where, node))
            if tensor in self.stream.axes or known != (where, node):
                raise Stays(f"'{tensor.name}' mixes channels with others")
        self.stream.readers.extend((reader, node) for reader in found.readers)
        self.joined.extend((join, node) for join in found.joins)
        if found.keeps_shift:
            self.stream.shifted.add(node)
        for tensor, uses in found.restored.items():
            self.stream.restored[tensor] = (node, uses)
            self.wanted.append(_wanted(tensor, uses, node))


def _wanted(value: ir.Value, taken: Uses, norm: ir.Node) -> str:
    """Why what a norm makes is wanted as it was."""
    others = [use.node for use in value.uses() if (use.node, use.idx) not in taken]
    if not others:
        return f"'{value.name}', behind the norm '{name_of(norm)}', is an output"
    return f"'{name_of(others[0])}' ({others[0].op_type}) reads the norm '{name_of(norm)}'"


def _of_channels(value: ir.Value, width: int | None) -> bool:
    """True for a constant [D], or one with only ones in front of D."""
    array = constant(value)
    return array is not None and array.ndim > 0 and array.size == array.shape[-1] == width
