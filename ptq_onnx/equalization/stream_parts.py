"""One residual stream: its tensors, and all that a matrix is folded into."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import onnx_ir as ir

from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.equalization.channel_axis import channels_of
from ptq_onnx.equalization.norm_readers import Uses
from ptq_onnx.graph.formula import sizes


@dataclass
class Stream:
    """One residual stream of ``width`` channels, and what a matrix is folded into."""

    width: int
    axes: dict[ir.Value, int] = field(default_factory=dict)
    """Its tensors, and the axis of the channels in each."""
    behind: dict[ir.Value, tuple[int, ir.Node]] = field(default_factory=dict)
    """What norms make of it: the channels' axis, and the norm."""
    norms: list[ir.Node] = field(default_factory=list)
    shifted: set[ir.Node] = field(default_factory=set)
    """Norms that keep their β, as (β/γ) R."""
    writers: list[ir.Node] = field(default_factory=list)
    """Linears and convolutions whose outputs are in it."""
    scaled: list[tuple[ir.Node, ir.Node]] = field(default_factory=list)
    """Linears behind which a Mul by a factor per channel stands (LayerScale), with the Mul."""
    readers: list[tuple[ir.Node, ir.Node | None]] = field(default_factory=list)
    """Linears and convolutions that read it, and the norm between."""
    constants: list[tuple[ir.Node, int, int]] = field(default_factory=list)
    """Constants in it: the node that reads one, the input's index, the channels' axis."""
    entered: dict[ir.Value, Uses] = field(default_factory=dict)
    """Its tensors that something else makes, with the uses in the stream: a product turns them."""
    restored: dict[ir.Value, tuple[ir.Node | None, Uses]] = field(default_factory=dict)
    """What something else reads too, the norm it is behind if any, and the uses that take it
    turned: a product turns it back for the others."""

    @property
    def products(self) -> tuple[ir.Value, ...]:
        """The tensors behind which a product is added."""
        return (*self.entered, *(value for value in self.restored if value not in self.entered))

    @property
    def added(self) -> float:
        """Multiplications of these, as a part of those of what writes to it and reads it."""
        linears = [*self.writers, *(n for n, _ in self.scaled), *(n for n, _ in self.readers)]
        own = sum(_multiplications(node) for node in dict.fromkeys(linears))
        more = sum(_elements(v) * (channels_of(v, _last(v)) or 1) for v in self.products)
        return more / max(own, 1)


def _last(value: ir.Value) -> int:
    return len(sizes(value) or []) - 1


def _elements(value: ir.Value) -> int:
    """How many a tensor has, dynamic axes counted as one."""
    return math.prod(d for d in sizes(value) or [] if isinstance(d, int))


def _multiplications(node: ir.Node) -> int:
    """Of a linear or convolution: one column of the weight for each element of the output."""
    weight = node.inputs[1]
    shape = [d for d in sizes(weight) or [] if isinstance(d, int)]
    outputs = 1 if is_linear(node) or node.op_type == "ConvTranspose" else 0
    return _elements(node.outputs[0]) * math.prod(shape) // max(shape[outputs], 1)
