"""One window attention of Swin on an image of tokens: partition, bias table, mask, and back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from small_graph import SmallGraph, sample

from ptq_onnx.fusion.rules import fuse

SIDE, WINDOW, WIDTH, HEADS = 4, 2, 8, 2
COUNT, TOKENS = (SIDE // WINDOW) ** 2, WINDOW**2


def _shift(g: SmallGraph, x: str) -> str:
    """The image moved by one token along both sides, what leaves it coming back."""
    for axis in (1, 2):
        first = g("Split", x, np.array([1, SIDE - 1]), axis=axis, outputs=2)
        x = g("Concat", f"{first}_1", first, axis=axis)
    return x


def swin_block() -> ir.Model:
    """[batch, 16, 8] → shifted windows of 4 tokens with a bias of positions and a mask."""
    g = SmallGraph(("batch", SIDE * SIDE, WIDTH))
    norm = g("LayerNormalization", "x", np.full(WIDTH, 1.2), np.full(WIDTH, 0.1), axis=-1)
    grid = np.array([-1, SIDE // WINDOW, WINDOW, SIDE // WINDOW, WINDOW, WIDTH])
    shifted = _shift(g, g("Reshape", norm, np.array([-1, SIDE, SIDE, WIDTH])))
    parts = g("Transpose", g("Reshape", shifted, grid), perm=[0, 1, 3, 2, 4, 5])
    windows = g("Reshape", parts, np.array([-1, TOKENS, WIDTH]))
    heads = []
    for part in range(3):
        made = g("MatMul", windows, sample(WIDTH, WIDTH, seed=part) * 0.4)
        made = g("Add", made, sample(WIDTH, seed=10 + part))
        split = g("Reshape", made, np.array([-1, TOKENS, HEADS, WIDTH // HEADS]))
        heads.append(g("Transpose", split, perm=[0, 2, 3, 1] if part == 1 else [0, 2, 1, 3]))
    scores = g("Mul", g("MatMul", heads[0], heads[1]), 0.5)
    scores = g("Add", scores, sample(1, HEADS, TOKENS, TOKENS, seed=20))
    masked = g("Reshape", scores, np.array([-1, COUNT, HEADS, TOKENS, TOKENS]))
    mask = np.zeros((1, COUNT, 1, TOKENS, TOKENS), np.float32)
    mask[:, 1::2, :, :2, 2:] = mask[:, 1::2, :, 2:, :2] = -100
    masked = g("Add", masked, mask)
    scores = g("Reshape", masked, np.array([-1, HEADS, TOKENS, TOKENS]))
    attended = g("MatMul", g("Softmax", scores, axis=-1), heads[2])
    joined = g(
        "Reshape", g("Transpose", attended, perm=[0, 2, 1, 3]), np.array([-1, TOKENS, WIDTH])
    )
    joined = g("MatMul", joined, sample(WIDTH, WIDTH, seed=5) * 0.4)
    joined = g("Add", joined, sample(WIDTH, seed=15))
    back = np.array([-1, SIDE // WINDOW, SIDE // WINDOW, WINDOW, WINDOW, WIDTH])
    image = g("Transpose", g("Reshape", joined, back), perm=[0, 1, 3, 2, 4, 5])
    x = g("Add", "x", g("Reshape", image, np.array([-1, SIDE * SIDE, WIDTH])))
    x = g("LayerNormalization", x, np.full(WIDTH, 1.5), np.full(WIDTH, 0.1), axis=-1)
    model = g.model(g("MatMul", g("ReduceMean", x, np.array([1]), keepdims=0), sample(WIDTH, 4)))
    fuse(model)
    return model


def square_heads() -> ir.Model:
    """[1, 4, 4, 16, 16] in 16 bits, reshaped and transposed to heads, which are read in 8."""
    g = SmallGraph((1, 4, 4, 16, 16))

    def coded(x: str, scale: float, zero: np.generic) -> str:
        numbers = g.const(np.float32(scale)), g.const(zero)
        return g("DequantizeLinear", g("QuantizeLinear", x, *numbers), *numbers)

    x = coded("x", 8 / 65535, np.uint16(32768))
    x = g("Transpose", g("Reshape", x, np.array([4, 4, 16, 16])), perm=[0, 1, 3, 2])
    return g.model(coded(x, 8 / 255, np.uint8(128)))
