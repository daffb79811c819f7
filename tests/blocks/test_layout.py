"""Index maps through layout ops against NumPy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_graph import SmallGraph

from ptq_onnx.blocks import element_map
from ptq_onnx.blocks.element_map import channel_map, layout_indices

Ints = NDArray[np.int64]
SHAPE: tuple[int | str, ...] = ("batch", 6, 8)
FLAT: Ints = np.arange(48).reshape(1, 6, 8)


def values(model: ir.Model) -> dict[str, ir.Value]:
    found = {str(v.name): v for node in model.graph for v in node.outputs}
    return found | {str(v.name): v for v in model.graph.inputs}


def traced(build: Callable[[SmallGraph], str]) -> tuple[ir.Value, ir.Value]:
    """The input and the built output."""
    g = SmallGraph(SHAPE)
    out = build(g)
    found = values(g.model(out))
    return found["x"], found[out]


CASES: dict[str, tuple[Callable[[SmallGraph], str], Ints]] = {
    "identity": (lambda g: g("Identity", "x"), FLAT),
    "reshape": (
        lambda g: g("Reshape", "x", np.array([0, 6, 2, 4])),
        FLAT.reshape(1, 6, 2, 4),
    ),
    "reshape -1": (lambda g: g("Reshape", "x", np.array([-1, 48])), FLAT.reshape(1, 48)),
    "transpose": (lambda g: g("Transpose", "x", perm=[0, 2, 1]), FLAT.transpose(0, 2, 1)),
    "heads": (
        lambda g: g("Transpose", g("Reshape", "x", np.array([0, 6, 2, 4])), perm=[0, 2, 3, 1]),
        FLAT.reshape(1, 6, 2, 4).transpose(0, 2, 3, 1),
    ),
    "slice": (
        lambda g: g("Slice", "x", np.array([1]), np.array([7]), np.array([2]), np.array([2])),
        FLAT[:, :, 1:7:2],
    ),
    "slice from the end": (
        lambda g: g("Slice", "x", np.array([-1]), np.array([-99]), np.array([1]), np.array([-2])),
        FLAT[:, ::-2],
    ),
    "gather": (lambda g: g("Gather", "x", np.array(0), axis=1), FLAT[:, 0]),
    "gather some": (
        lambda g: g("Gather", "x", np.array([3, -1, 3]), axis=2),
        FLAT[:, :, [3, -1, 3]],
    ),
    "unsqueeze": (lambda g: g("Unsqueeze", "x", np.array([1, 4])), FLAT[:, None, :, :, None]),
    "squeeze": (
        lambda g: g("Squeeze", g("Slice", "x", *(np.array([v]) for v in (2, 3, 1))), np.array([1])),
        FLAT[:, 2],
    ),
    "flatten": (lambda g: g("Flatten", "x", axis=1), FLAT.reshape(1, 48)),
    "split, first": (
        lambda g: g("Split", "x", np.array([3, 5]), axis=2, outputs=2),
        FLAT[:, :, :3],
    ),
    "split, second": (
        lambda g: g("Split", "x", np.array([3, 5]), axis=2, outputs=2) + "_1",
        FLAT[:, :, 3:],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_indices_are_numpys(case: str) -> None:
    build, expected = CASES[case]
    found = layout_indices(*traced(build))
    assert found is not None
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=30)
@given(st.permutations([1, 2, 3]), st.sampled_from([(2, 4), (4, 2), (8, 1), (1, 8)]))
def test_any_order_of_heads(order: list[int], heads: tuple[int, int]) -> None:
    start, end = traced(
        lambda g: g("Transpose", g("Reshape", "x", np.array([0, 6, *heads])), perm=[0, *order])
    )
    expected = FLAT.reshape(1, 6, *heads).transpose(0, *order)
    np.testing.assert_array_equal(layout_indices(start, end), expected)
    shape = [1, 1, 1]
    for axis, size in zip((2, 3), heads, strict=True):
        shape[order.index(axis)] = size
    columns = np.arange(8).reshape(heads)
    placed = columns if order.index(2) < order.index(3) else columns.T
    found = channel_map(start, end, tuple(shape))
    np.testing.assert_array_equal(found, placed.reshape(shape))


def test_columns_of_a_packed_linear() -> None:
    """q, k (transposed) and v of one linear: which of its columns each channel is."""
    g = SmallGraph(("batch", 5, 24))
    split = g("Reshape", "x", np.array([0, 5, 3, 2, 4]))
    turned = g("Transpose", split, perm=[2, 0, 3, 1, 4])
    first = g("Split", turned, np.array([1, 1, 1]), axis=0, outputs=3)
    q, k, v = (g("Squeeze", name, np.array([0])) for name in (first, f"{first}_1", f"{first}_2"))
    k = g("Transpose", k, perm=[0, 1, 3, 2])
    found = values(g.model(q, k, v))
    columns = np.arange(24).reshape(3, 2, 4)
    for name, shape, index in ((q, (2, 1, 4), 0), (k, (2, 4, 1), 1), (v, (2, 1, 4), 2)):
        mapped = channel_map(found["x"], found[name], shape)
        np.testing.assert_array_equal(mapped, columns[index].reshape(shape))


def test_channels_that_mix_have_no_map() -> None:
    """A channel of the transposed tensor holds all columns; so does a shared axis of heads."""
    start, end = traced(lambda g: g("Transpose", "x", perm=[0, 2, 1]))
    assert channel_map(start, end, (6,)) is None
    np.testing.assert_array_equal(channel_map(start, end, (8, 1)), np.arange(8)[:, None])
    start, end = traced(lambda g: g("Reshape", "x", np.array([0, 6, 2, 4])))
    assert channel_map(start, end, (4,)) is None
    np.testing.assert_array_equal(channel_map(start, end, (2, 4)), np.arange(8).reshape(2, 4))
    assert channel_map(start, end, (2, 1)) is None
    assert channel_map(start, end, (3, 4)) is None


def test_what_is_no_layout_has_no_indices() -> None:
    g = SmallGraph(SHAPE)
    relu = g("Relu", "x")
    behind = g("Transpose", relu, perm=[0, 2, 1])
    joined = g("Concat", "x", "x", axis=1)
    data = g("Reshape", "x", g("Cast", g("ReduceMax", "x", keepdims=0), to=7))
    found = values(g.model(behind, joined))
    assert layout_indices(found["x"], found[behind]) is None
    np.testing.assert_array_equal(
        layout_indices(found["x"], found[joined]), np.concatenate([FLAT, FLAT], axis=1)
    )
    assert layout_indices(found["x"], found[data]) is None
    np.testing.assert_array_equal(
        layout_indices(found[relu], found[behind]), FLAT.transpose(0, 2, 1)
    )
    np.testing.assert_array_equal(layout_indices(found["x"], found["x"]), FLAT)


def test_other_dynamic_axes_have_no_indices() -> None:
    g = SmallGraph(("batch", "tokens", 8))
    out = g("Transpose", "x", perm=[0, 2, 1])
    found = values(g.model(out))
    assert layout_indices(found["x"], found[out]) is None
    assert channel_map(found["x"], found[out], (8, 1)) is None


def test_what_moves_alike_is_followed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tensors are called, and anew where a constant or a size is another."""
    runs: list[int] = []

    class Counted(element_map.ReferenceEvaluator):  # type: ignore[misc]
        def run(self, *given: Any) -> Any:
            runs.append(1)
            return super().run(*given)

    monkeypatch.setattr(element_map, "ReferenceEvaluator", Counted)
    element_map._followed.cache_clear()
    element_map._channels.cache_clear()
    g = SmallGraph(SHAPE)
    sizes = np.array([0, 6, 2, 4]), np.array([0, 6, 4, 2])
    parts = [g("Reshape", g("Relu", "x"), size) for size in (sizes[0], sizes[0], sizes[1])]
    found = values(g.model(*parts))
    starts = [f"relu{2 * number}" for number in range(3)]
    pairs = list(zip(starts, parts, strict=True))
    one, two, three = (layout_indices(found[a], found[b]) for a, b in pairs)
    assert one is two
    assert len(runs) == 2
    assert one is not None
    assert three is not None
    np.testing.assert_array_equal(one, FLAT.reshape(1, 6, 2, 4))
    np.testing.assert_array_equal(three, FLAT.reshape(1, 6, 4, 2))
    for start, part in pairs[:2]:
        channels = channel_map(found[start], found[part], (2, 4))
        np.testing.assert_array_equal(channels, np.arange(8).reshape(2, 4))
    assert len(runs) == 2
    with pytest.raises(ValueError, match="read-only"):
        one[0] = 0
    monkeypatch.setattr(element_map, "KEPT_ELEMENTS", 47)  # one less than the tensor has
    layout_indices(found[starts[0]], found[parts[0]])
    layout_indices(found[starts[0]], found[parts[0]])
    assert len(runs) == 4
