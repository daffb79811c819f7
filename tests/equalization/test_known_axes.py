"""Where channels go through an op, by numbers that lie along an axis."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run

from ptq_onnx.equalization.channel_axis import (
    along_channels,
    axis_before,
    axis_behind,
    channels_of,
)
from ptq_onnx.equalization.foldings import keys_may_shift, norm_before

AXES: list[tuple[str, tuple[int, ...], list[Any], dict[str, Any]]] = [
    ("Transpose", (2, 3, 8), [], {"perm": [2, 0, 1]}),
    ("Transpose", (2, 3, 8), [], {}),
    ("Add", (3, 8), [np.zeros((2, 3, 8))], {}),
    ("Add", (2, 3, 8), [np.zeros(8)], {}),
    ("Mul", (3, 8), [np.ones((2, 1, 1))], {}),
    ("Reshape", (2, 3, 8), [np.array([6, 8])], {}),
    ("Reshape", (2, 8, 3), [np.array([2, 8, 3, 1])], {}),
    ("Reshape", (2, 3, 8), [np.array([2, 3, 2, 4])], {}),
    ("Reshape", (2, 8, 4, 4), [np.array([2, 8, 16])], {}),
    ("Flatten", (2, 3, 8), [], {"axis": 2}),
    ("Squeeze", (2, 1, 8), [np.array([1])], {}),
    ("Unsqueeze", (2, 8), [np.array([1])], {}),
    ("Gather", (2, 3, 8), [np.array(1)], {"axis": 1}),
    ("Gather", (2, 3, 8), [np.array([[0, 1]])], {"axis": 0}),
    ("Gather", (2, 3, 8), [np.array([1, 0])], {"axis": 2}),
    ("ReduceMean", (2, 3, 8), [np.array([1])], {"keepdims": 0}),
    ("ReduceMean", (2, 3, 8), [np.array([-2])], {"keepdims": 1}),
    ("ReduceSum", (2, 3, 8), [np.array([0, 1])], {"keepdims": 0}),
    ("GlobalAveragePool", (2, 8, 3, 3), [], {}),
    ("Slice", (2, 3, 8), [np.array([1]), np.array([3]), np.array([1])], {}),
    ("Slice", (2, 3, 8), [np.array([0]), np.array([1])], {}),
    ("Slice", (2, 3, 8), [np.array([0]), np.array([4]), np.array([-1])], {}),
    ("Tile", (2, 3, 8), [np.array([1, 2, 1])], {}),
    ("Tile", (2, 3, 8), [np.array([1, 1, 2])], {}),
    ("Pad", (2, 3, 8), [np.array([0, 1, 0, 0, 0, 0])], {}),
    ("Expand", (1, 8), [np.array([3, 4, 8])], {}),
    ("Expand", (1, 8), [np.array([2, 3, 4, 8])], {}),
    ("Identity", (2, 3, 8), [], {}),
    ("Split", (2, 4, 8), [np.array([4])], {"axis": 1}),
]


@pytest.mark.parametrize(("op", "shape", "inputs", "attributes"), AXES, ids=lambda v: str(v)[:24])
def test_where_channels_go(
    op: str, shape: tuple[int, ...], inputs: list[Any], attributes: dict[str, Any]
) -> None:
    """Numbers along an axis come out along the axis that is found, and no other; where none is,
    no axis of the result has them. Backwards the same."""
    g = SmallGraph(shape)
    model = g.model(g(op, "x", *inputs, **attributes))
    node = next(iter(model.graph))
    found = [axis_behind(node, 0, axis, shape[axis]) for axis in range(len(shape))]
    zeros = op in ("Pad",)
    made = []
    for axis, size in enumerate(shape):
        line = np.arange(1, size + 1, dtype=np.float32)
        x = np.broadcast_to(line.reshape(-1, *[1] * (len(shape) - 1 - axis)), shape)
        (y,) = run(model, np.ascontiguousarray(x))
        if op == "ReduceSum":
            y = y / np.prod([shape[int(a)] for a in inputs[0]])
        places = []
        for place, length in enumerate(y.shape):
            if length % size or size == 1:
                continue
            wanted = np.resize(line, length).reshape(-1, *[1] * (y.ndim - 1 - place))
            if np.array_equal(
                np.where((y == 0) & zeros, wanted, y), np.broadcast_to(wanted, y.shape)
            ):
                places.append(place)
        made.append(places)
        if size == 1:
            continue
        if found[axis] is None:
            assert op in ("Reshape", "Slice", "Gather", "ReduceMean", "ReduceSum", "Split", "Tile",
                          "GlobalAveragePool", "Pad", "Flatten", "Expand"), places  # fmt: skip
            assert not places or len(set(line)) == 1 or op in ("Slice", "Tile", "Split", "Gather")
        else:
            assert found[axis] in places
            assert axis_before(node, 0, found[axis], size) == axis


@pytest.mark.parametrize(
    ("axis", "shape", "takes"),
    [(-1, None, True), (0, None, False), (1, None, False), (-2, None, False),
     (2, (2, 3, 8), True), (1, (2, 3, 8), False), (-1, (2, 3, 8), True)],
)  # fmt: skip
def test_the_last_axis_is_known_by_the_rank_alone(
    axis: int, shape: tuple[int, ...] | None, takes: bool
) -> None:
    """A softmax and a norm over any other axis, or one that may be another, take no factors."""
    g = SmallGraph((2, 3, 8))
    product = g("MatMul", "x", np.ones((8, 8)))
    weights = g("Softmax", product, axis=axis)
    normed = g("LayerNormalization", weights, np.ones(8), np.zeros(8), axis=axis)
    model = g.model(g("Linear", normed, np.ones((8, 4)), domain="ptq_onnx"))
    for node in model.graph:
        node.outputs[0].shape = None if shape is None else ir.Shape(shape)
    nodes = {node.op_type: node for node in model.graph}
    assert keys_may_shift(next(iter(model.graph))) == takes
    assert (norm_before(nodes["LayerNormalization"].outputs[0]) is not None) == takes


def test_sizes_of_axes_that_there_are() -> None:
    value = ir.val("x", ir.DataType.FLOAT, ("n", 3, 8))
    assert [channels_of(value, axis) for axis in range(-1, 4)] == [None, None, 3, 8, None]
    assert channels_of(ir.val("x"), 0) is None
    assert channels_of(None, 0) is None


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_a_concat_along_the_channels(axis: int) -> None:
    g = SmallGraph((2, 3, 8))
    (node,) = g.model(g("Concat", "x", "x", axis=axis)).graph
    assert [along_channels(node, channels) for channels in range(3)] == [
        channels == axis % 3 for channels in range(3)
    ]
