"""A small classifier of images with one attention, for tests that run whole jobs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from small_graph import SmallGraph

SIDE, WIDTH, HEADS = 16, 16, 2


def random(seed: int, *shape: int, scale: float = 0.3) -> np.ndarray:
    return (np.random.default_rng(seed).normal(0, scale, shape)).astype(np.float32)


def linear(g: SmallGraph, x: str, rows: int, columns: int, seed: int) -> str:
    product = g("MatMul", x, random(seed, rows, columns, scale=rows**-0.5))
    return g("Add", product, random(seed + 1, columns, scale=0.1))


def image_model(
    path: Path,
    *,
    batch: int | str = "batch",
    kernel: int = 4,
    pads: tuple[int, ...] = (0, 0, 0, 0),
    explicit_pad: bool = False,
    auto_pad: str = "",
    first: str = "",
    channels: int = 3,
) -> Path:
    """Patches of ``kernel`` pixels at steps of 4, one block, a head of 10 classes.

    ``batch``: a number writes it into every Reshape. ``first``: "depthwise" puts a convolution
    of one pixel per channel in front.
    """
    g = SmallGraph((batch, channels, SIDE, SIDE))
    x, rows = "x", 0 if isinstance(batch, str) else batch
    if first:
        x = g("Conv", x, random(1, channels, 1, 1, 1, scale=1), random(2, channels), group=channels)
    if explicit_pad:
        x, pads = g("Pad", x, np.array([0, 0, *pads[:2], 0, 0, *pads[2:]])), (0, 0, 0, 0)
    weight = random(3, WIDTH, channels, kernel, kernel, scale=(channels * kernel**2) ** -0.5)
    how = {"auto_pad": auto_pad} if auto_pad else {"pads": pads}
    x = g("Conv", x, weight, random(4, WIDTH), strides=[4, 4], **how)
    tokens = (SIDE // 4) ** 2
    x = g("Reshape", x, np.array([rows, WIDTH, tokens]))
    x = g("Transpose", x, perm=[0, 2, 1])
    norm = g("LayerNormalization", x, 1 + random(5, WIDTH), random(6, WIDTH), axis=-1)
    heads = []
    for part in range(3):
        made = linear(g, norm, WIDTH, WIDTH, 10 + 2 * part)
        split = g("Reshape", made, np.array([rows, tokens, HEADS, WIDTH // HEADS]))
        heads.append(g("Transpose", split, perm=[0, 2, 3, 1] if part == 1 else [0, 2, 1, 3]))
    scores = g("Mul", g("MatMul", heads[0], heads[1]), np.float32((WIDTH // HEADS) ** -0.5))
    attended = g("MatMul", g("Softmax", scores, axis=-1), heads[2])
    joined = g("Transpose", attended, perm=[0, 2, 1, 3])
    joined = g("Reshape", joined, np.array([rows, tokens, WIDTH]))
    x = g("Add", x, linear(g, joined, WIDTH, WIDTH, 20))
    norm = g("LayerNormalization", x, 1 + random(7, WIDTH), random(8, WIDTH), axis=-1)
    hidden = g("Gelu", linear(g, norm, WIDTH, 4 * WIDTH, 22))
    x = g("Add", x, linear(g, hidden, 4 * WIDTH, WIDTH, 24))
    pooled = g("ReduceMean", x, np.array([1]), keepdims=0)
    return g.save(path, linear(g, pooled, WIDTH, 10, 26))


def pictures(folder: Path, count: int, side: int = SIDE) -> Path:
    """Pictures of bright and dark patches."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng(index)
        coarse = rng.integers(0, 256, (4, 4, 3)).repeat(side // 4, 0).repeat(side // 4, 1)
        noise = rng.integers(-20, 21, coarse.shape)
        Image.fromarray(np.clip(coarse + noise, 0, 255).astype(np.uint8)).save(
            folder / f"{index:03d}.png"
        )
    return folder
