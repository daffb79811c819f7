"""Frees a model of a fixed batch size: the same function of each image, of any number of images.

A model exported with a batch of 8 runs on 8 images at a time; the last batch would have to be
filled up, and what fills it would count in every statistic. So the size is taken out of the
shapes that the exporter wrote, for the work inside; files keep the batch that they had. Whether
each image's outputs are what they were is seen by running both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.graph.formula import constant, new_constant
from ptq_onnx.preparation.cleaning import clean
from ptq_onnx.preparation.model_sessions import open_plain

NAME = "batch"
CLOSE = 1e-3
"""Relative; what the order of sums explains."""


@dataclass(frozen=True)
class FixedBatch:
    """The batch size of a file, and the shapes of its outputs."""

    size: int
    outputs: tuple[ir.Shape | None, ...]

    def restore(self, model: ir.Model) -> ir.Model:
        """A copy of a freed model that takes this many images again."""
        copy = model.clone()
        image = _image(copy)
        assert image.shape is not None
        image.shape = ir.Shape([self.size, *list(image.shape)[1:]])
        for value, shape in zip(copy.graph.outputs, self.outputs, strict=True):
            value.shape = shape
        return copy


def fixed_batch(model: ir.Model) -> FixedBatch | None:
    """The batch size of a model with one input, where it is fixed to more than one image."""
    free = [v for v in model.graph.inputs if not v.is_initializer()]
    shape = free[0].shape if len(free) == 1 else None
    size = None if shape is None or len(shape) == 0 else shape[0]
    if not isinstance(size, int) or size < 2:
        return None
    return FixedBatch(size, tuple(v.shape for v in model.graph.outputs))


def _image(model: ir.Model) -> ir.Value:
    return next(v for v in model.graph.inputs if not v.is_initializer())


def freed(model: ir.Model, fixed: FixedBatch, opset: int) -> ir.Model | None:
    """A copy of a cleaned model that takes any number of images; None where its graph cannot."""
    copy = model.clone()
    graph = copy.graph
    image = _image(copy)
    dependent = {image}
    for node in list(graph):
        if any(v in dependent for v in node.inputs):
            if node.op_type == "Reshape":
                _free_reshape(graph, node, fixed.size)
            elif node.op_type == "Resize":
                _free_resize(graph, node, fixed.size)
            _free_constants(graph, node, image, fixed.size)
            dependent.update(node.outputs)
    assert image.shape is not None
    image.shape = ir.Shape([NAME, *list(image.shape)[1:]])
    for node in graph:
        for value in node.outputs:
            value.shape = None
    try:
        clean(copy, opset)
        return copy if _same(model, copy, fixed.size) else None
    except Exception:  # shapes that fit one batch size alone: inference and the runtime both raise
        return None


def _free_reshape(graph: ir.Graph, node: ir.Node, size: int) -> None:
    """The target without the batch size: on the first axis that holds it."""
    data, output, written = node.inputs[0], node.outputs[0], constant(node.inputs[1])
    if written is None or data is None or output.shape is None:
        return
    target = [int(d) for d in written]
    wide = [d for d in output.shape if isinstance(d, int)]
    known = len(wide) == len(target)
    axes = [axis for axis, d in enumerate(wide if known else target[:1]) if d % size == 0]
    if not axes:
        return
    axis = axes[0]
    before = [] if data.shape is None else list(data.shape)
    kept = known and axis < len(before) and before[axis] == wide[axis] == size
    zero = (kept or not known) and not node.attributes.get_int("allowzero", 0)
    if known:
        target = wide
    target[axis] = 0 if zero else -1
    made = new_constant(graph, f"{output.name}_any_batch", np.array(target, np.int64))
    node.replace_input_with(1, made)


def _free_resize(graph: ir.Graph, node: ir.Node, size: int) -> None:
    """The sizes of the image's axes alone."""
    sizes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    if sizes is None or len(sizes) < 3 or sizes[0] != size or "axes" in node.attributes:
        return
    name = f"{node.outputs[0].name}_sides"
    node.replace_input_with(3, new_constant(graph, name, np.asarray(sizes[2:], np.int64)))
    node.attributes["axes"] = ir.AttrInt64s("axes", list(range(2, len(sizes))))


ALIGNED = frozenset(("Add", "Sub", "Mul", "Div", "Where", "Max", "Min", "Pow", "Concat", "MatMul"))


def _free_constants(graph: ir.Graph, node: ir.Node, image: ir.Value, size: int) -> None:
    """Constants that repeat themselves for each image of the batch, for any batch."""
    output = node.outputs[0]
    if node.op_type not in ALIGNED or output.shape is None or not len(output.shape):
        return
    if node.op_type == "Concat" and node.attributes.get_int("axis", 0) == 0:
        return
    rows = output.shape[0]
    for index, value in enumerate(node.inputs):
        array = constant(value)
        if value is None or array is None or array.ndim != len(output.shape):
            continue
        if array.ndim < 2 or array.shape[0] != rows or array.shape[0] % size:
            continue
        parts = array.reshape(size, -1, *array.shape[1:])
        if np.array_equal(parts, np.broadcast_to(parts[:1], parts.shape)):
            made = _repeated(graph, node, f"{value.name}", parts[0], image)
            node.replace_input_with(index, made)


def _repeated(
    graph: ir.Graph, node: ir.Node, name: str, one: NDArray[np.generic], image: ir.Value
) -> ir.Value:
    """``one`` [rows of an image, …] as often as there are images."""
    if node.op_type != "Concat" and len(one) == 1:
        return new_constant(graph, f"{name}_of_one", one)
    part = new_constant(graph, f"{name}_of_one", one[None])
    rest = new_constant(graph, f"{name}_sizes", np.array(one.shape, np.int64))
    whole = new_constant(graph, f"{name}_shape", np.array([-1, *one.shape[1:]], np.int64))
    count = ir.node("Shape", [image], {"start": 0, "end": 1})
    shape = ir.node("Concat", [count.outputs[0], rest], {"axis": 0})
    wide = ir.node("Expand", [part, shape.outputs[0]])
    flat = ir.node("Reshape", [wide.outputs[0], whole])
    for number, made in enumerate((count, shape, wide, flat)):
        made.outputs[0].name = f"{name}_any_batch_{number}_{len(graph)}"
        made.outputs[0].dtype = ir.DataType.INT64 if number < 2 else ir.DataType(part.dtype or 1)
        graph.insert_before(node, made)
    return flat.outputs[0]


def _same(model: ir.Model, other: ir.Model, size: int) -> bool:
    """Whether both give the same for a whole batch, and ``other`` for its first image alone."""
    image = _image(model)
    sides = [d if isinstance(d, int) else 64 for d in list(image.shape or [])[1:]]
    images = np.random.default_rng(0).standard_normal((size, *sides), np.float32)
    feed = str(image.name)
    wanted = open_plain(model).run(None, {feed: images})
    session = open_plain(other)
    for number in (size, 1):
        found = session.run(None, {feed: images[:number]})
        for a, b in zip(wanted, found, strict=True):
            part = a[: len(a) * number // size].astype(np.float64)
            if part.shape != b.shape:
                return False
            if np.sum((part - b) ** 2) > CLOSE**2 * np.sum(part**2):
                return False
    return True
