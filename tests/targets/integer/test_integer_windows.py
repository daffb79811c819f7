"""Windows in integers: shifted, masked, with relative positions, merged between stages (Swin)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from bit_exact import assert_exact
from small_graph import SmallGraph, sample
from test_integer_lowering import calibrated

from ptq_onnx.blocks.element_map import is_part, layout_indices
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.preparation.cleaning import infer_shapes
from ptq_onnx.quantizers.base import SiteQuantizer
from ptq_onnx.targets.integer.elementwise import MaskStep
from ptq_onnx.targets.integer.grid import MaskedGrid
from ptq_onnx.targets.integer.nodes import make_plan
from ptq_onnx.targets.integer.softmax import Kind, SoftmaxStep

SIDE, WINDOW, WIDTH, HEADS = 4, 2, 8, 2
WINDOWS = (SIDE // WINDOW) ** 2
CELLS = WINDOW * WINDOW


def linear(g: SmallGraph, x: str, rows: int, columns: int, seed: int) -> str:
    product = g("MatMul", x, sample(rows, columns, seed=seed) * 0.3)
    return g("Add", product, sample(columns, seed=seed + 50))


def norm(g: SmallGraph, x: str, width: int = WIDTH) -> str:
    return g("LayerNormalization", x, np.full(width, 1.5), np.full(width, 0.1), axis=-1)


def rolled(g: SmallGraph, x: str, by: int) -> str:
    """Shifted along both sides, as exporters write torch.roll."""
    for axis in (1, 2):
        first = g("Split", x, np.array([by, SIDE - by]), axis=axis, outputs=2)
        x = g("Concat", f"{first}_1", first, axis=axis)
    return x


def mask() -> np.ndarray:
    """[1, windows, 1, cells, cells]: cells of a shifted window that were no neighbours."""
    regions = np.zeros((SIDE, SIDE), int)
    for number, (rows, columns) in enumerate(
        (r, c) for r in (slice(0, 2), slice(2, 3), slice(3, 4)) for c in (0, 2, 3)
    ):
        regions[rows, columns:] = number
    cut = regions.reshape(2, WINDOW, 2, WINDOW).transpose(0, 2, 1, 3).reshape(WINDOWS, CELLS)
    apart = cut[:, None, :] != cut[:, :, None]
    return np.where(apart, -100.0, 0.0).astype(np.float32)[None, :, None]


def tiled_mask(g: SmallGraph) -> str:
    """[batch · windows, 1, cells, cells], as transformers writes it."""
    batch = g("Gather", g("Shape", "x"), np.array([0]), axis=0)
    shape = g("Concat", batch, np.array([WINDOWS, 1, CELLS, CELLS]), axis=0)
    return g("Reshape", g("Expand", mask(), shape), np.array([-1, 1, CELLS, CELLS]))


def block(g: SmallGraph, x: str, shift: int, seed: int, tiled: bool) -> str:
    y = norm(g, x)
    y = rolled(g, y, shift) if shift else y
    y = g("Reshape", y, np.array([-1, 2, WINDOW, 2, WINDOW, WIDTH]))
    y = g("Transpose", y, perm=[0, 1, 3, 2, 4, 5])
    y = g("Reshape", y, np.array([-1, CELLS, WIDTH]))
    packed = linear(g, y, WIDTH, 3 * WIDTH, seed)
    parts = g("Reshape", packed, np.array([-1, CELLS, 3, HEADS, WIDTH // HEADS]))
    parts = g("Transpose", parts, perm=[2, 0, 3, 1, 4])
    q, k, v = (g("Gather", parts, np.array(i), axis=0) for i in range(3))
    logits = g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2]))
    logits = g("Mul", logits, 0.5)
    logits = g("Add", logits, sample(1, HEADS, CELLS, CELLS, seed=seed + 7))
    if shift and tiled:
        logits = g("Add", logits, tiled_mask(g))
    elif shift:
        logits = g("Reshape", logits, np.array([-1, WINDOWS, HEADS, CELLS, CELLS]))
        logits = g("Add", logits, mask())
        logits = g("Reshape", logits, np.array([-1, HEADS, CELLS, CELLS]))
    y = g("MatMul", g("Softmax", logits, axis=-1), v)
    y = g("Transpose", y, perm=[0, 2, 1, 3])
    y = linear(g, g("Reshape", y, np.array([-1, CELLS, WIDTH])), WIDTH, WIDTH, seed + 1)
    y = g("Reshape", y, np.array([-1, 2, 2, WINDOW, WINDOW, WIDTH]))
    y = g("Transpose", y, perm=[0, 1, 3, 2, 4, 5])
    y = g("Reshape", y, np.array([-1, SIDE, SIDE, WIDTH]))
    x = g("Add", x, rolled(g, y, SIDE - shift) if shift else y)
    y = g("Gelu", linear(g, norm(g, x), WIDTH, 2 * WIDTH, seed + 2))
    return g("Add", x, linear(g, y, 2 * WIDTH, WIDTH, seed + 3))


@cache
def network(tiled: bool = False) -> ir.Model:
    """Two blocks, the second shifted → patch merging → norm → mean over both sides → head.
    ``tiled``: with its mask repeated for each image, and the mean over the last axis."""
    g = SmallGraph(("batch", SIDE, SIDE, WIDTH))
    x = block(g, block(g, "x", 0, 0, tiled), 1, 20, tiled)
    x = g("Reshape", x, np.array([-1, 2, 2, 2, 2, WIDTH]))
    x = g("Transpose", x, perm=[0, 1, 3, 4, 2, 5])
    x = g("Reshape", x, np.array([-1, 2, 2, 4 * WIDTH]))
    x = linear(g, norm(g, x, 4 * WIDTH), 4 * WIDTH, 2 * WIDTH, 90)
    x = norm(g, x, 2 * WIDTH)
    if tiled:
        x = g("Transpose", g("Reshape", x, np.array([-1, 4, 2 * WIDTH])), perm=[0, 2, 1])
        pooled = g("Reshape", g("ReduceMean", x, np.array([2])), np.array([-1, 2 * WIDTH]))
    else:
        pooled = g("ReduceMean", x, np.array([1, 2]), keepdims=0)
    model = g.model(linear(g, pooled, 2 * WIDTH, 4, 99))
    infer_shapes(model)
    fuse(model)
    infer_shapes(model)
    return model


def batch(seed: int, count: int = 8) -> np.ndarray:
    shape = (count, SIDE, SIDE, WIDTH)
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def quantized(tiled: bool = False, **options: Any) -> SiteQuantizer:
    return calibrated(network(tiled), [batch(0), batch(1)], **options)


@pytest.mark.parametrize(
    ("options", "tiled"),
    [({}, False), ({"bits": "8/8/4"}, False), ({"lis": False}, False), ({}, True)],
    ids=str,
)
def test_a_network_of_windows_is_bit_exact_three_times(
    options: dict[str, Any], tiled: bool
) -> None:
    assert_exact(network(tiled), quantized(tiled, **options), batch(2, 16))


def test_what_is_shut_out_changes_nothing() -> None:
    """A window's cells that were no neighbours do not hear of each other."""
    steps = make_plan(network(), quantized().specs).steps.values()
    (masked,) = (one for one in steps if isinstance(one.step, MaskStep))
    assert isinstance(masked.made, MaskedGrid)
    assert masked.step.open.sum() == (mask() == 0).sum() == 16 + 8 + 8 + 4


@pytest.mark.parametrize("kind", ["shares", "uniform", "log2"])
def test_a_masked_softmax_is_that_of_the_open_ones(kind: Kind) -> None:
    random = np.random.default_rng(3)
    codes = random.integers(0, 256, (200, 9))
    open_ = random.random((200, 9)) < 0.5
    open_[:, 4] = True
    bits = 4 if kind == "log2" else 8
    step = SoftmaxStep(0.04, 9, bits, kind, 255, masked=True)
    plain = SoftmaxStep(0.04, 9, bits, kind, 255)
    found = step(np.where(open_, codes, -1))
    nothing = plain.last + 1 if kind == "log2" else 0
    assert (found[~open_] == nothing).all()
    for row, code, kept in zip(found, codes, open_, strict=True):
        np.testing.assert_array_equal(row[kept], plain(code[kept]))


def test_real_values_of_a_masked_grid_give_its_codes_again() -> None:
    grid = MaskedGrid(np.array(0.5), np.array(128), 0, 255, np.zeros((), np.int64), 0.5)
    codes = np.array([-1, 0, 1, 128, 255])
    found = grid.floats(codes)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [-114, -64, -63.5, 0, 63.5])
    np.testing.assert_array_equal(grid.ints(found), codes)
    np.testing.assert_array_equal(grid.ints(np.array([-1e4, -164.0])), [-1, -1])


def test_elements_are_followed_through_what_is_joined_anew() -> None:
    g = SmallGraph(("batch", SIDE, SIDE, WIDTH))
    shifted = rolled(g, "x", 1)
    joined = g("Concat", shifted, np.zeros((1, SIDE, SIDE, WIDTH), np.float32), axis=1)
    model = g.model(g("Relu", shifted), g("Relu", joined))
    values = {str(v.name): v for n in model.graph for v in n.outputs}
    source = model.graph.inputs[0]
    indices = layout_indices(source, values[shifted])
    assert indices is not None
    whole = np.arange(SIDE * SIDE * WIDTH).reshape(1, SIDE, SIDE, WIDTH)
    np.testing.assert_array_equal(indices, np.roll(whole, (-1, -1), (1, 2)))
    assert is_part(values[shifted], source)
    assert not is_part(values[joined], source)
    assert layout_indices(source, values[joined]) is None
