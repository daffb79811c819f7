"""Which axis of a tensor counts tokens, and which token is the class token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.roles import Blocks
from ptq_onnx.blocks.sites import image_input
from ptq_onnx.blocks.walking import name_of

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Tokens:
    """``count`` tokens, of which the first ``extra`` are no patches (class token, registers);
    ``rows`` x ``columns`` patches."""

    count: int
    extra: int
    rows: int
    columns: int

    def split(self, value: Array) -> tuple[Array, Array] | None:
        """(class token, patches) of a tensor [B, …]; None where it has no token axis, or the
        model no class token. Of an attention map the axis of the queries is split."""
        if not self.extra or value.ndim < 3:
            return None
        axes = [a for a in range(1, value.ndim) if value.shape[a] == self.count]
        if not axes:
            return None
        before_last = value.ndim - 2
        axis = before_last if before_last in axes else axes[-1]
        return value.take([0], axis), value.take(range(self.extra, self.count), axis)


def first_images(value: Array, batch: int, count: int) -> Array:
    """What belongs to the first ``count`` of ``batch`` images: axis 0 counts images, or their
    windows, image after image."""
    if count >= batch or value.ndim == 0 or len(value) % batch:
        return value
    return value[: len(value) // batch * count]


def find_tokens(model: ir.Model, blocks: Blocks) -> Tokens | None:
    """The tokens of the first attention over the whole image; None where there is none."""
    shape = image_input(model).shape
    picture = () if shape is None else tuple(d if isinstance(d, int) else 0 for d in shape)
    if len(picture) != 4 or 0 in picture[1:]:
        return None
    for node in model.graph:
        if blocks.roles[name_of(node)].name != "softmax" or node.outputs[0].shape is None:
            continue
        sizes = [d if isinstance(d, int) else 0 for d in node.outputs[0].shape]
        layout = patch_layout((1, *sizes[1:]), picture[1:])
        if layout is not None:
            rows, columns, extra = layout
            return Tokens(rows * columns + extra, extra, rows, columns)
    return None


def patch_layout(attention: tuple[int, ...], image: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Rows, columns and number of extra tokens (class, registers) of attention [1, H, N, N].

    The patch grid has the picture's aspect ratio; None where no such grid fits, or the
    attention is not square over one image.
    """
    if len(attention) != 4 or attention[0] != 1 or attention[2] != attention[3]:
        return None
    tokens, height, width = attention[3], image[1], image[2]
    for extra in range(6):
        patches = tokens - extra
        rows = round(float(np.sqrt(max(patches, 0) * height / width)))
        if rows and patches % rows == 0 and rows * width == (patches // rows) * height:
            return rows, patches // rows, extra
    return None
