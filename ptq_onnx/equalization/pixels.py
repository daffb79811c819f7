"""The step of 8-bit pictures, for the input of a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.channels import rows_of
from ptq_onnx.blocks.roles import Role
from ptq_onnx.blocks.sites import image_input
from ptq_onnx.blocks.walking import is_linear, through_layout
from ptq_onnx.equalization.foldings import insert_affine, new_nodes_as
from ptq_onnx.equalization.linear_weights import move_input_channels, move_rows
from ptq_onnx.equalization.padding import pad_apart
from ptq_onnx.graph.formula import constant

Double = NDArray[np.float64]


def image_in_pixels(
    model: ir.Model,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    centred: bool = False,
    convolutions: bool = True,
) -> tuple[dict[str, Role], dict[str, tuple[float, float]]]:
    """Let the patch embedding read the image in units that 8-bit pixels fill exactly.

    A normalised pixel is (p / 255 - mean) / std. Where all channels share a std, an Add that
    makes black zero is enough, else a Mul brings all to one unit. ``centred``: zero is 128, for
    codes with a sign. What a convolution pads is padded before: the border's zeros become the
    pixels next to the mean. Returns the roles of the new nodes and the exact range of the tensor
    that the patch embedding reads; both are empty, and the model as it was, where the image is
    read by anything else, or by a convolution and these are not quantized (``convolutions``).
    """
    image = _behind_pads(image_input(model))
    found = _patch_embedding(image, len(mean), convolutions)
    if found is None:
        return {}, {}
    node, read = found
    units = _Units.of(mean, std, centred)
    direct, roles = read is image, dict[str, Role]()
    with new_nodes_as(model.graph, Role(None, "input"), roles):
        if is_linear(node):
            index = np.arange(len(mean), dtype=np.float32).reshape(-1, 1, 1)
            rows = rows_of(image, read, index)
            if rows is None:
                return {}, {}
            order = rows.astype(np.int64)
            move_rows(model.graph, node, units.factor[order], units.shift[order])
        else:
            padded = pad_apart(model.graph, node, image)
            if padded is None:
                return {}, {}
            image = padded
            move_input_channels(model.graph, node, units.factor, units.shift)
        spread = (len(mean), 1, 1)
        made = insert_affine(
            model.graph, image, units.shift.reshape(spread), units.factor.reshape(spread), "pixels"
        )
    return roles, {str(made.name) if direct else str(read.name): units.ends}


@dataclass(frozen=True)
class _Units:
    """A normalised image is (image - shift) / factor, both float64 [C], in the units in which its
    8-bit pixels end at ``ends``."""

    shift: Double
    factor: Double
    ends: tuple[float, float]

    @classmethod
    def of(cls, mean: tuple[float, ...], std: tuple[float, ...], centred: bool) -> _Units:
        """One unit where all channels have the same std; else each its own, by the factor."""
        unit = 1 / (255 * np.array(std, np.float64))
        shared = bool(np.all(unit == unit[0]))
        zero = 128.0 if centred else 0.0
        step = float(unit[0]) if shared else 1.0
        return cls(
            shift=(zero / 255 - np.array(mean, np.float64)) / np.array(std, np.float64),
            factor=np.ones(len(unit)) if shared else unit,
            ends=(-zero * step, (255 - zero) * step),
        )


def _patch_embedding(
    image: ir.Value, channels: int, convolutions: bool
) -> tuple[ir.Node, ir.Value] | None:
    """The one linear or convolution that reads the image, behind layout ops, and the tensor that
    it reads; None where there is no such, or the image has other channels."""
    leaves = [leaf for leaf in through_layout(image) if leaf[0].op_type != "Shape"]
    if len(leaves) != 1 or leaves[0][1] != 0:
        return None
    node = leaves[0][0]
    weight, read = constant(node.inputs[1]) if len(node.inputs) > 1 else None, node.inputs[0]
    if weight is None or read is None or image.shape is None or image.shape[1] != channels:
        return None
    if is_linear(node) or (convolutions and node.op_type == "Conv" and read is image):
        return node, read
    return None


def _behind_pads(image: ir.Value) -> ir.Value:
    """The image behind the Pads that alone read it: a shift behind them leaves the border zero."""
    while True:
        uses = [use.node for use in image.uses() if use.node.op_type != "Shape"]
        if len(uses) != 1 or uses[0].op_type != "Pad" or uses[0].inputs[0] is not image:
            return image
        image = uses[0].outputs[0]
