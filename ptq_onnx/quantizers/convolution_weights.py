"""Weights of convolutions, rounded by what they do to the outputs on what is read in integers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.numerics.fake_quantize import dequantize
from ptq_onnx.numerics.rounding import gptq, shrunk
from ptq_onnx.numerics.spec import TensorSpec

Array = NDArray[np.float32]
Double = NDArray[np.float64]
WIDEST = 2048
"""Numbers under a kernel up to which second moments of them are taken."""
ROWS = 1 << 15
"""Pixels that second moments are taken of, about."""


def rounded_weight(
    conv: ir.Node, weight: Array, spec: TensorSpec, batches: Sequence[Array]
) -> Array | None:
    """The weight [N, C, h, w] in steps of its spec, by ``gptq`` on what the convolution reads
    ([B, C, H, W] each); None where it has groups, whose few weights leave nothing to make up with,
    or more than ``WIDEST`` numbers under its kernel."""
    width = int(np.prod(weight.shape[1:]))
    if width > WIDEST or conv.attributes.get_int("group", 1) != 1 or not _has_plain_window(conv):
        return None
    flat = weight.reshape(len(weight), width).T  # [K, N]
    scale = np.broadcast_to(np.asarray(spec.scale, np.float32).ravel(), flat.shape[1:])
    moments, rows = moments_of(conv, weight.shape, batches)
    codes = gptq(flat, scale, shrunk(moments, rows), spec.rule.bits)
    return dequantize(codes.T.reshape(weight.shape).astype(np.int32), spec)


def moments_of(conv: ir.Node, shape: Sequence[int], batches: Sequence[Array]) -> tuple[Double, int]:
    """E[xᵀx] of what lies under the kernel, [K, K], and of how many pixels. With the mean: where
    the image is padded, the bias does not take it out."""
    width, images = int(np.prod(shape[1:])), sum(map(len, batches))
    total, rows = np.zeros((width, width)), 0
    for x in patches(conv, shape, batches, max(ROWS // max(images, 1), 1)):
        flat = x.reshape(-1, width)
        total += (flat.T @ flat).astype(np.float64)
        rows += len(flat)
    return total / max(rows, 1), rows


def patches(
    conv: ir.Node, shape: Sequence[int], batches: Iterable[Array], most: int
) -> Iterator[Array]:
    """What lies under the kernel, [pixels, C, h, w] for each batch, of about ``most`` pixels of an
    image."""
    top, left, bottom, right = conv.attributes.get_ints("pads", [0] * 4)
    down, across = conv.attributes.get_ints("strides", [1, 1])
    for x in batches:
        padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        view = np.lib.stride_tricks.sliding_window_view(padded, tuple(shape[2:]), axis=(2, 3))
        view = view[:, :, ::down, ::across]
        pixels = view.shape[2] * view.shape[3]
        chosen = np.arange(0, pixels, -(-pixels // most))
        rows, columns = np.divmod(chosen, view.shape[3])
        picked = view[:, :, rows, columns]  # [B, C, pixels, h, w]
        yield np.moveaxis(picked, 2, 1).reshape(-1, x.shape[1], *shape[2:])


def _has_plain_window(conv: ir.Node) -> bool:
    named = conv.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    return named and all(d == 1 for d in conv.attributes.get_ints("dilations", [1]))
