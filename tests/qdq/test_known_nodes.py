"""What is put behind a tensor: its names, types and shapes, and in which order."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from small_graph import SmallGraph

from ptq_onnx.qdq.nodes import Behind, Nodes


def behind() -> tuple[ir.Model, ir.Value, Behind]:
    g = SmallGraph((2, 3, 4))
    model = g.model(g("Relu", "x"))
    value = model.graph.outputs[0]
    nodes = Nodes(model.graph, names={"x", "relu0"})
    return model, value, Behind(nodes, value, value.producer())


def test_shapes_of_what_is_written() -> None:
    """The tensor's own; one entry along an axis; or none that is stated."""
    _, value, builder = behind()
    whole = builder.op("Abs", [value], "whole")
    single = builder.op("ReduceMax", [value], "single", single=-1)
    middle = builder.op("ReduceMax", [value], "middle", single=-2)
    left = builder.op("Neg", [value], "open", shaped=False)
    assert whole.shape == ir.Shape([2, 3, 4])
    assert single.shape == ir.Shape([2, 3, 1])
    assert middle.shape == ir.Shape([2, 1, 4])
    assert left.shape is None
    assert value.shape == ir.Shape([2, 3, 4])


def test_types_names_and_order() -> None:
    """One behind the other, under names that are new."""
    model, value, builder = behind()
    first = builder.op("Abs", [value], "a")
    other = builder.op("Not", [value], "a", dtype=np.dtype(np.bool_))
    cast = builder.cast(first, "b", np.dtype(np.uint8))
    number = builder.constant("c", np.float32(2))
    assert [v.name for v in (first, other, cast, number)] == [
        "relu0_a", "relu0_a_1", "relu0_b", "relu0_c"
    ]  # fmt: skip
    kinds = [v.dtype.name for v in (first, other, cast, number) if v.dtype is not None]
    assert kinds == ["FLOAT", "BOOL", "UINT8", "FLOAT"]
    assert [n.op_type for n in model.graph] == ["Relu", "Abs", "Not", "Cast"]


def test_sizes_that_are_known() -> None:
    _, value, builder = behind()
    assert [builder.size(axis) for axis in range(-4, 4)] == [0, 2, 3, 4, 2, 3, 4, 0]
    value.shape = ir.Shape(["batch", 3, 4])
    assert [builder.size(axis) for axis in (0, 1, -3, -1)] == [0, 3, 0, 4]
    value.shape = None
    assert builder.size(0) == 0
