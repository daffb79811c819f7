"""The padding of a convolution: as numbers, and as a node of its own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ptq_onnx.equalization.writer import Writer
from ptq_onnx.graph.formula import constant, new_constant


def pads_of(conv: ir.Node) -> tuple[int, ...] | int | None:
    """What a convolution pads, begins then ends; 0 where nothing; None where that is not known."""
    attributes = conv.attributes
    auto = attributes.get_string("auto_pad", "NOTSET")
    pads = tuple(attributes.get_ints("pads", ()))
    if auto == "VALID" or (auto == "NOTSET" and not any(pads)):
        return 0
    return pads if auto == "NOTSET" else _same_pads(conv, upper=auto == "SAME_UPPER")


def _same_pads(conv: ir.Node, *, upper: bool) -> tuple[int, ...] | int | None:
    """The pads of ``auto_pad`` SAME: as many outputs as input / stride, rounded up."""
    image, weight = conv.inputs[0], constant(conv.inputs[1])
    sides = [] if image is None or image.shape is None else list(image.shape)[2:]
    if weight is None or not sides or not all(isinstance(d, int) for d in sides):
        return None
    ones = (1,) * len(sides)
    strides = conv.attributes.get_ints("strides", ones)
    dilations = conv.attributes.get_ints("dilations", ones)
    begins, ends = [], []
    for side, kernel, stride, step in zip(sides, weight.shape[2:], strides, dilations, strict=True):
        assert isinstance(side, int)
        reach = (-(-side // stride) - 1) * stride + (kernel - 1) * step + 1
        total = max(reach - side, 0)
        begins.append(total // 2 if upper else total - total // 2)
        ends.append(total - begins[-1])
    return (*begins, *ends) if any(begins) or any(ends) else 0


def pad_apart(graph: ir.Graph, conv: ir.Node, value: ir.Value) -> ir.Value | None:
    """Let a Pad do what the convolution pads of ``value``, its input; returns what it reads then.

    None where the padding is not known; the graph is then as it was.
    """
    pads = pads_of(conv)
    if pads is None or value.shape is None:
        return None
    if isinstance(pads, int):
        return value
    axes = len(pads) // 2
    begins, ends = pads[:axes], pads[axes:]
    wide = [
        d + low + high if isinstance(d, int) else ir.SymbolicDim(None)
        for d, low, high in zip(list(value.shape)[2:], begins, ends, strict=True)
    ]
    sizes = np.array([0, 0, *begins, 0, 0, *ends], np.int64)
    constant_pads = new_constant(graph, f"{value.name}_pads", sizes)
    write = Writer(graph, conv)
    shape = [*list(value.shape)[:2], *wide]
    made = write.node("Pad", [value, constant_pads], shape, value, "padded")
    conv.replace_input_with(0, made)
    conv.attributes.pop("auto_pad", None)
    conv.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))
    return made
