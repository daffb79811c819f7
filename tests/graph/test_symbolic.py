"""Shape arithmetic over named dimensions: constants where no dynamic dimension has a part."""

from __future__ import annotations

import numpy as np
import pytest
from small_graph import SmallGraph, assert_same, ops, sample

from ptq_onnx.graph.symbolic_shapes import Symbolic, fold_shapes
from ptq_onnx.preparation.cleaning import clean


def windows(g: SmallGraph, window: int) -> str:
    """timm's Swin: pad to whole windows by (w - H % w) % w, cut into windows."""
    shape = g("Shape", "x")
    sizes = [g("Gather", shape, np.array(i), axis=0) for i in range(4)]
    size = np.array(window)
    pads = [g("Mod", g("Sub", size, g("Mod", s, size)), size) for s in sizes[1:3]]
    zero = np.zeros(1, np.int64)
    flat = [g("Unsqueeze", p, np.array([0])) for p in pads]
    padded = g("Pad", "x", g("Concat", zero, zero, zero, zero, zero, *flat, zero, axis=0))
    after = g("Shape", padded)
    counts = [g("Div", g("Gather", after, np.array(i), axis=0), size) for i in (1, 2)]
    batch = g("Unsqueeze", sizes[0], np.array([0]))
    parts = [g("Unsqueeze", c, np.array([0])) for c in counts]
    one = np.array([window])
    target = g("Concat", batch, parts[0], one, parts[1], one, np.array([8]), axis=0)
    cut = g("Transpose", g("Reshape", padded, target), perm=[0, 1, 3, 2, 4, 5])
    return g("Reshape", cut, np.array([-1, window * window, 8]))


@pytest.mark.parametrize("window", [4, 3])
def test_computed_padding_and_windows_fold(window: int) -> None:
    g = SmallGraph(("batch", 8, 8, 8))
    out = windows(g, window)
    model = g.model(out)
    clean(model)
    assert set(ops(model)) <= {"Pad", "Reshape", "Transpose"}
    assert ("Pad" in ops(model)) == (window == 3)
    assert_same(model, g.proto(out), sample(2, 8, 8, 8))
    count = (-(-8 // window)) ** 2
    assert str(next(reversed(model.graph)).outputs[0].shape[0]) == f"{count}*batch"


def test_what_depends_on_the_batch_stays() -> None:
    g = SmallGraph(("batch", 4, 8))
    shape = g("Shape", "x")
    batch = g("Gather", shape, np.array([0]), axis=0)
    other = g("Gather", shape, np.array([1]), axis=0)
    out = g(
        "Reshape",
        "x",
        g(
            "Concat",
            g("Mul", batch, np.array([2])),
            g("Div", other, np.array([2])),
            np.array([8]),
            axis=0,
        ),
    )
    model = g.model(out)
    found = Symbolic(model.graph).run()
    by_name = {value.name: data for value, data in found.data.items()}
    assert str(by_name[batch][0]) == "batch"
    assert by_name[other][0] == 4
    before = len(model.graph.initializers)
    assert fold_shapes(model.graph) > 0
    assert len(model.graph.initializers) > before
    assert_same(model, g.proto(out), sample(3, 4, 8))


def test_a_dynamic_height_is_never_taken_for_a_number() -> None:
    g = SmallGraph(("batch", 3, "height", 8))
    shape = g("Shape", "x")
    height = g("Gather", shape, np.array([2]), axis=0)
    half = g("Div", height, np.array([2]))
    out = g("Reshape", "x", g("Concat", np.array([0, 3]), half, np.array([16]), axis=0))
    model = g.model(out)
    found = Symbolic(model.graph).run()
    data = {value.name: data for value, data in found.data.items()}
    assert str(data[half][0]) == "floor(height/2)"
    clean(model)
    assert_same(model, g.proto(out), sample(2, 3, 6, 8))


def test_an_expand_in_front_of_arithmetic_goes() -> None:
    g = SmallGraph(("batch", 4, 8))
    norm = g("ReduceMax", "x", np.array([-1]), keepdims=1)
    out = g("Sub", "x", g("Expand", norm, g("Shape", "x")))
    model = g.model(out)
    clean(model)
    assert ops(model) == ["ReduceMax", "Sub"]
    assert_same(model, g.proto(out), sample(2, 4, 8))


def test_a_tiny_epsilon_is_not_taken_for_zero() -> None:
    """HF's layer norms have ε = 1e-12."""
    g = SmallGraph(("batch", 4, 8))
    out = g("Sqrt", g("Add", g("Mul", g("Add", g("Abs", "x"), 0.0), 1.0), 1e-12))
    model = g.model(out)
    clean(model)
    assert ops(model) == ["Abs", "Add", "Sqrt"]
    assert_same(model, g.proto(out), np.zeros((1, 4, 8), np.float32))
