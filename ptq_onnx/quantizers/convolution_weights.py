"""Weights of convolutions, fitted to what is read in integers, and rounded by what they do to the
outputs on it."""

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


DAMPING = 1.0
"""Of the mean power of what is read: how firmly a refitted weight is held."""


def may_round(conv: ir.Node) -> bool:
    """True for a convolution of one group (with more, the few weights of each leave nothing to make
    up with), with at most ``WIDEST`` numbers under its kernel and no gaps there."""
    weight = conv.inputs[1]
    sizes = [] if weight is None or weight.shape is None else weight.shape.numpy()
    if np.prod(sizes[1:]) > WIDEST or conv.attributes.get_int("group", 1) != 1:
        return False
    named = conv.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    return named and all(d == 1 for d in conv.attributes.get_ints("dilations", [1]))


def refitted(
    conv: ir.Node,
    weight: Array,
    exact: Sequence[Array],
    given: Sequence[Array],
    moments: Double,
) -> Array:
    """The weight [N, C, h, w] that makes of what the convolution reads in integers, x̂
    (``given``), most nearly what W makes of x (``exact``, both [B, C, H, W] each):
    W + W·E[(x − x̂)x̂ᵀ]·(E[x̂x̂ᵀ] + λI)⁻¹, E[x̂x̂ᵀ] being ``moments``. It takes out errors that
    neighbouring pixels share, as over paper or sky, which no sum of them averages. Source: Zhong et
    al., "ERQ" (arXiv 2407.06794), whose ridge regression is of linears.
    """
    width, rows = len(moments), 0
    shared = np.zeros((width, width))
    pairs = (patches(conv, weight.shape, of, _pixels(of)) for of in (exact, given))
    for pair in zip(*pairs, strict=True):
        x, read = (of.reshape(-1, width) for of in pair)
        shared += (x - read).T @ read
        rows += len(read)
    level = DAMPING * np.trace(moments) / width + np.finfo(np.float32).tiny
    flat = weight.reshape(-1, width).astype(np.float64)
    change = np.linalg.solve(moments + level * np.eye(width), (flat @ shared).T / max(rows, 1)).T
    return np.asarray(flat + change, np.float32).reshape(weight.shape)


def rounded_weight(weight: Array, spec: TensorSpec, moments: Double, rows: int) -> Array:
    """The weight [N, C, h, w] in steps of its spec, by ``gptq`` for the second moments of so many
    pixels."""
    flat = weight.reshape(len(weight), -1).T  # [K, N]
    scale = np.broadcast_to(np.asarray(spec.scale, np.float32).ravel(), flat.shape[1:])
    codes = gptq(flat, scale, shrunk(moments, rows), spec.rule.bits)
    return dequantize(codes.T.reshape(weight.shape).astype(np.int32), spec)


def moments_of(conv: ir.Node, shape: Sequence[int], batches: Sequence[Array]) -> tuple[Double, int]:
    """E[xᵀx] of what lies under the kernel, [K, K], and of how many pixels. With the mean: where
    the image is padded, the bias does not take it out."""
    width = int(np.prod(shape[1:]))
    total, rows = np.zeros((width, width)), 0
    for x in patches(conv, shape, batches, _pixels(batches)):
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


def _pixels(batches: Sequence[Array]) -> int:
    """Of how many pixels of an image second moments are taken."""
    return max(ROWS // max(sum(map(len, batches)), 1), 1)
