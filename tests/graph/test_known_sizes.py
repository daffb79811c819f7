"""Sizes of what a graph makes that takes images of any size, at the size that its images have."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, sample

from ptq_onnx.blocks import region_costs
from ptq_onnx.graph.known_sizes import known_sizes, note_elements
from ptq_onnx.images.preprocess import METADATA_KEY, Preprocess

SIZE = (48, 320)
OPEN: tuple[int | str, ...] = ("n", 3, "h", "w")


def network(shape: tuple[int | str, ...], size: tuple[int, int] | None = SIZE) -> ir.Model:
    """Two convolutions that halve, then tokens: of 48 × 320 pixels 960 of 8 channels."""
    g = SmallGraph(shape)
    x = g("Conv", "x", sample(4, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1])
    x = g("QuantizeLinear", x, np.float32(0.1), np.uint8(0))
    x = g("DequantizeLinear", x, np.float32(0.1), np.uint8(0))
    x = g("Conv", x, sample(8, 4, 2, 2), strides=[2, 2])
    flat = g("Reshape", x, np.array([0, 8, -1]))
    tokens = g("Transpose", flat, perm=[0, 2, 1])
    model = g.model(g("MatMul", tokens, sample(8, 5)))
    if size is not None:
        found = Preprocess((0.5,) * 3, (0.5,) * 3, size)
        model.metadata_props[METADATA_KEY] = found.to_json()
    return model


def test_sizes_of_an_open_graph() -> None:
    model = network(OPEN)
    found = {n.op_type: known_sizes(model)[n.outputs[0]] for n in model.graph}
    assert found == {
        "QuantizeLinear": (1, 4, 24, 160),
        "DequantizeLinear": (1, 4, 24, 160),
        "Conv": (1, 8, 12, 80),
        "Reshape": (1, 8, 960),
        "Transpose": (1, 960, 8),
        "MatMul": (1, 960, 5),
    }


@pytest.mark.parametrize(
    ("shape", "expected"), [(("n", 3, 48, "w"), 4 * 24 * 160), ((2, 3, "h", 64), 4 * 24 * 32)]
)
def test_one_open_side_and_a_fixed_batch(shape: tuple[int | str, ...], expected: int) -> None:
    """A side that the graph fixes counts as the graph says; the elements are those of one image."""
    model = network(shape)
    note_elements(model)
    assert region_costs.elements(model.graph[0].outputs[0]) == expected


def test_channels_last() -> None:
    g = SmallGraph(("n", "h", "w", 3))
    model = g.model(g("Conv", g("Transpose", "x", perm=[0, 3, 1, 2]), sample(4, 3, 2, 2)))
    model.metadata_props[METADATA_KEY] = Preprocess((0.5,) * 3, (0.5,) * 3, SIZE).to_json()
    assert known_sizes(model)[model.graph[1].outputs[0]] == (1, 4, 47, 319)


def test_nothing_without_a_size_or_an_open_side() -> None:
    for model in (network(OPEN, size=None), network(("n", 3, 48, 320))):
        assert known_sizes(model) == {}
    unreadable = network(OPEN)
    unreadable.metadata_props[METADATA_KEY] = "{}"
    assert known_sizes(unreadable) == {}
    note_elements(unreadable)
    first = unreadable.graph[0].outputs[0]
    assert region_costs.elements(first) == 4 * region_costs.UNKNOWN**2


def test_an_initializer_among_the_inputs_is_no_image() -> None:
    model = network(OPEN)
    weight = next(v for name, v in model.graph.initializers.items() if name == "c0")
    model.graph.inputs.insert(0, weight)
    note_elements(model)
    assert region_costs.elements(model.graph[0].outputs[0]) == 4 * 24 * 160
