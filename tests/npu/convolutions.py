"""A network of convolutions as text recognisers and dense heads have them, its image size open."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from small_graph import SmallGraph, sample

from ptq_onnx.fusion.rules import fuse

IMAGE = 3, 16, 24


def _conv(
    g: SmallGraph, x: str, seed: int, out: int, inner: int, side: int, **attributes: Any
) -> str:
    weight = sample(out, inner, side, side, seed=seed) / np.sqrt(inner * side**2)
    pads = {"pads": [side // 2] * 4}
    return g("Conv", x, weight, sample(out, seed=seed + 50) * 0.1, **pads, **attributes)


def convolutional() -> ir.Model:
    """[batch, 3, height, width]: hard swish, a gate from the pooled image, both pools, a transposed
    convolution, and an image that is enlarged."""
    g = SmallGraph(("batch", 3, "height", "width"))
    x = g("HardSwish", _conv(g, "x", 1, 8, 3, 3, strides=[2, 2]))
    x = g("HardSwish", _conv(g, x, 2, 8, 1, 3, group=8))
    gate = g("Relu", _conv(g, g("GlobalAveragePool", x), 3, 4, 8, 1))
    gate = g("HardSigmoid", _conv(g, gate, 4, 8, 4, 1), alpha=1 / 6, beta=0.5)
    x = g("MaxPool", g("Mul", x, gate), kernel_shape=[2, 2], strides=[1, 1])
    x = g("AveragePool", _conv(g, x, 5, 8, 8, 1), kernel_shape=[2, 2], strides=[1, 1])
    kernel = sample(8, 6, 4, 4, seed=6) * np.linspace(0.02, 0.4, 6)[:, None, None]
    up = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    x = g("Relu", g("ConvTranspose", x, kernel, sample(6, seed=56) * 0.1, **up))
    x = _conv(g, x, 7, 1, 6, 1)
    scales = np.array([1, 1, 1.5, 1.5], np.float32)
    x = g("Resize", x, "", scales, mode="linear", coordinate_transformation_mode="half_pixel")
    model = g.model(g("Sigmoid", x))
    fuse(model)
    return model


def swish_image() -> ir.Model:
    """x · sigmoid(x) of 32 channels between two convolutions."""
    g = SmallGraph(("batch", 3, "height", "width"))
    x = _conv(g, "x", 1, 32, 3, 3)
    model = g.model(_conv(g, g("Mul", x, g("Sigmoid", x)), 2, 4, 32, 1))
    fuse(model)
    return model


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *IMAGE)).astype(np.float32)
