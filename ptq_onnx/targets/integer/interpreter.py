"""Runs an integer ONNX file with NumPy alone, and refuses every overflow.

Written from the ONNX operator texts, apart from the exporter and the simulator: what it
shares with them is the file. It gives the same bits as ONNX Runtime for every tensor, keeps
the smallest and the largest value that each tensor took, and raises where a value does not
fit its type, a shift is as wide as its type, or a divisor is zero; a runtime would wrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ptq_onnx.errors import ModelError, PtqError
from ptq_onnx.runtime.sessions import Session

Array = NDArray[Any]
Attributes = Mapping[str, Any]


class IntegerOverflow(PtqError):
    """A value of an integer file does not fit its type."""


class Interpreter:
    """One integer file. ``ranges``: the extremes of every integer tensor over all runs."""

    def __init__(self, model: str | Path | onnx.ModelProto) -> None:
        self.model = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
        graph = self.model.graph
        self.constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.nodes = [
            (n, {a.name: helper.get_attribute_value(a) for a in n.attribute}) for n in graph.node
        ]
        unknown = [n for n, _ in self.nodes if n.op_type not in OPS]
        if unknown:
            raise ModelError(
                f"Node '{unknown[0].name}' ({unknown[0].op_type}): not an op of integer files."
            )
        self.last_use: dict[str, int] = {}
        for index, (node, _) in enumerate(self.nodes):
            self.last_use.update(dict.fromkeys(node.input, index))
        self.inputs = [v.name for v in graph.input if v.name not in self.constants]
        self.outputs = [v.name for v in graph.output]
        self.ranges: dict[str, tuple[int, int]] = {}

    def run(
        self, image: Array, visit: Callable[[str, Array], None] | None = None
    ) -> dict[str, Array]:
        """The outputs for one batch; every tensor, as it is made, goes to ``visit``.

        Raises IntegerOverflow, naming the node.
        """
        values: dict[str, Array] = {self.inputs[0]: image}
        for index, (node, attributes) in enumerate(self.nodes):
            inputs = [
                None if not n else self.constants[n] if n in self.constants else values[n]
                for n in node.input
            ]
            try:
                found = OPS[node.op_type](inputs, attributes)
            except IntegerOverflow as error:
                raise IntegerOverflow(f"Node '{node.name}' ({node.op_type}): {error}") from None
            outputs = found if isinstance(found, list) else [found]
            for name, value in zip(node.output, outputs, strict=True):
                values[name] = value
                self._record(name, value)
                if visit is not None:
                    visit(name, value)
            for name in node.input:
                if self.last_use.get(name) == index and name not in self.outputs:
                    values.pop(name, None)
        return {name: values[name] for name in self.outputs}

    def _record(self, name: str, value: Array) -> None:
        if value.dtype.kind not in "iu" or not value.size:
            return
        low, high = int(value.min()), int(value.max())
        before = self.ranges.get(name, (low, high))
        self.ranges[name] = min(low, before[0]), max(high, before[1])


def differing_tensors(
    model: str | Path | onnx.ModelProto, batches: Any, threads: int = 1
) -> tuple[int, list[str], dict[str, tuple[int, int]]]:
    """Number of tensors compared with ONNX Runtime, optimizations on, bit by bit, over
    all batches; the names of those that differ; and the ranges seen.

    Every node output is made an output of the file for it.
    """
    import onnxruntime as ort

    interpreter = Interpreter(model)
    names = [o for n, _ in interpreter.nodes for o in n.output]
    tapped = onnx.ModelProto()
    tapped.CopyFrom(interpreter.model)
    known = {v.name for v in tapped.graph.output}
    tapped.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = Session(tapped.SerializeToString(), options, providers=["CPUExecutionProvider"])
    different: list[str] = []
    for batch in batches:
        expected = dict(zip(names, session.run(names, {interpreter.inputs[0]: batch}), strict=True))

        def compare(name: str, value: Array, expected: dict[str, Array] = expected) -> None:
            other = expected.pop(name)
            same = value.dtype == other.dtype and np.array_equal(value, other)
            if not same and name not in different:
                different.append(name)

        interpreter.run(batch, compare)
    return len(names), different, interpreter.ranges


# --- numbers ----------------------------------------------------------------------------


def extremes(x: Array) -> tuple[int, int]:
    """Smallest and largest value, as Python ints."""
    return (int(x.min()), int(x.max())) if x.size else (0, 0)


def fits(low: int, high: int, dtype: np.dtype[Any]) -> bool:
    """True where [low, high] is within the type."""
    limits = np.iinfo(dtype)
    return limits.min <= low and high <= limits.max


def exact(op: Callable[[Any, Any], Any], x: Array, y: Array) -> Array:
    """op on integers of one type; Python's own integers where the extremes could overflow. Behind
    the codes of an output also on floats: the factors of its channels."""
    if x.dtype != y.dtype:
        raise IntegerOverflow(f"types {x.dtype} and {y.dtype} differ")
    if x.dtype.kind == "f":
        return np.asarray(op(x, y))
    corners = [op(a, b) for a in extremes(x) for b in extremes(y)]
    if fits(min(corners), max(corners), x.dtype):
        return np.asarray(op(x, y), x.dtype)
    wider = object if x.dtype.itemsize > 4 else np.int64
    wide = np.asarray(op(x.astype(wider), y.astype(wider)))
    low, high = (int(wide.min()), int(wide.max())) if wide.size else (0, 0)
    if not fits(low, high, x.dtype):
        raise IntegerOverflow(f"[{low}, {high}] does not fit {x.dtype}")
    return np.asarray(wide, x.dtype)


def divide(x: Array, y: Array) -> Array:
    """Integer division that truncates towards zero."""
    if not np.all(y):
        raise IntegerOverflow("division by zero")
    quotient, remainder = np.divmod(x, y)
    return np.asarray(quotient + ((remainder != 0) & ((x < 0) != (y < 0))), x.dtype)


def absolute(x: Array) -> Array:
    """|x|; the lowest integer of a type has none."""
    low, high = extremes(x)
    if not fits(0, max(-low, high), x.dtype):
        raise IntegerOverflow(f"the magnitude of {low} does not fit {x.dtype}")
    return np.asarray(np.abs(x))


def bit_shift(inputs: list[Any], attributes: Attributes) -> Array:
    """BitShift. Raises IntegerOverflow for a shift by the type's width or more, and for lost
    bits."""
    x, by = inputs
    width = x.dtype.itemsize * 8
    if x.dtype.kind != "u" or by.dtype != x.dtype:
        raise IntegerOverflow(f"shifts take unsigned integers of one type, not {x.dtype}")
    if extremes(by)[1] >= width:
        raise IntegerOverflow(f"a shift by {extremes(by)[1]} of {width} bits")
    if attributes["direction"] == b"RIGHT":
        return np.asarray(x >> by, x.dtype)
    shifted = np.asarray(x << by, x.dtype)
    if not np.array_equal(shifted >> by, np.broadcast_to(x, shifted.shape)):
        raise IntegerOverflow(f"a shift to the left loses bits of {x.dtype}")
    return shifted


def cast(inputs: list[Any], attributes: Attributes) -> Array:
    """Cast. Raises IntegerOverflow where an integer does not fit the new type."""
    x = inputs[0]
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(attributes["to"]))
    if x.dtype.kind in "iu" and not fits(*extremes(x), dtype):
        raise IntegerOverflow(f"{extremes(x)} does not fit {dtype}")
    return np.asarray(x.astype(dtype))


def reduce_sum(inputs: list[Any], attributes: Attributes) -> Array:
    """ReduceSum. Raises IntegerOverflow where a sum does not fit the input's type."""
    x, axes = inputs
    axis = tuple(int(a) for a in axes)
    count = math.prod(x.shape[a] for a in axis)
    low, high = extremes(x)
    keep = bool(attributes.get("keepdims", 1))
    if not fits(count * min(low, 0), count * max(high, 0), np.dtype(np.int64)):
        wide = np.asarray(x.astype(object).sum(axis=axis, keepdims=keep))
    else:
        wide = np.asarray(x.sum(axis=axis, keepdims=keep, dtype=np.int64))
    low, high = min(wide.ravel()), max(wide.ravel())
    if not fits(int(low), int(high), x.dtype):
        raise IntegerOverflow(f"a sum in [{low}, {high}] does not fit {x.dtype}")
    return wide.astype(x.dtype)


def reduce_max(inputs: list[Any], attributes: Attributes) -> Array:
    """ReduceMax."""
    x, axes = inputs
    keep = bool(attributes.get("keepdims", 1))
    return np.asarray(x.max(axis=tuple(int(a) for a in axes), keepdims=keep))


# --- products ---------------------------------------------------------------------------


def centred(inputs: list[Any], index: int) -> NDArray[np.float64]:
    """Codes minus their zero point, in float64, which holds products and sums below 2^53."""
    x = inputs[index].astype(np.float64)
    zero = inputs[index + 2] if len(inputs) > index + 2 else None
    return np.asarray(x if zero is None else x - float(zero.reshape(())))


def as_int32(x: NDArray[np.float64]) -> Array:
    """Whole float64 numbers as int32. Raises IntegerOverflow where one does not fit."""
    if x.size and not fits(int(x.min()), int(x.max()), np.dtype(np.int32)):
        raise IntegerOverflow(f"a sum in [{int(x.min())}, {int(x.max())}] does not fit int32")
    return x.astype(np.int32)


def matmul_integer(inputs: list[Any], _: Attributes) -> Array:
    """MatMulInteger, zero points taken off; exact in float64. Raises IntegerOverflow beyond
    int32."""
    return as_int32(centred(inputs, 0) @ centred(inputs, 1))


def conv_integer(inputs: list[Any], attributes: Attributes) -> Array:
    """A convolution over two axes, tap by tap: each weight of the kernel times the part of the
    image that it meets."""
    x, w = centred(inputs, 0), centred(inputs, 1)
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    down, across = attributes.get("strides", [1, 1])
    rise, run = attributes.get("dilations", [1, 1])
    groups = attributes.get("group", 1)
    batch, channels, height, width = x.shape
    padded = np.zeros((batch, channels, top + height + bottom, left + width + right))
    padded[:, :, top : top + height, left : left + width] = x
    rows = (padded.shape[2] - rise * (w.shape[2] - 1) - 1) // down + 1
    columns = (padded.shape[3] - run * (w.shape[3] - 1) - 1) // across + 1
    grouped = w.reshape(groups, -1, *w.shape[1:])
    sums = np.zeros((batch, groups, grouped.shape[1], rows, columns))
    for i, j in np.ndindex(*w.shape[2:]):
        part = padded[:, :, i * rise :, j * run :][:, :, ::down, ::across][:, :, :rows, :columns]
        part = part.reshape(batch, groups, -1, rows, columns)
        sums += np.einsum("bgcrq,gnc->bgnrq", part, grouped[..., i, j])
    return as_int32(sums.reshape(batch, -1, rows, columns))


# --- floats at either end ---------------------------------------------------------------


def quantize_linear(inputs: list[Any], _: Attributes) -> Array:
    """QuantizeLinear with one scale, rounded half to even and clipped to the type."""
    x, scale, zero = inputs
    limits = np.iinfo(zero.dtype)
    codes = np.rint(x / scale) + zero.astype(np.float32)
    return np.asarray(np.clip(codes, limits.min, limits.max).astype(zero.dtype))


def dequantize_linear(inputs: list[Any], _: Attributes) -> Array:
    """DequantizeLinear with one scale; float32."""
    x, scale, zero = inputs
    return np.asarray((x.astype(np.int32) - zero.astype(np.int32)).astype(np.float32) * scale)


# --- layout -----------------------------------------------------------------------------


def reshape(inputs: list[Any], attributes: Attributes) -> Array:
    """Reshape; a 0 keeps the size of its axis, unless ``allowzero``."""
    x, shape = inputs
    keep = not attributes.get("allowzero", 0)
    return np.asarray(
        x.reshape([x.shape[i] if n == 0 and keep else int(n) for i, n in enumerate(shape)])
    )


def split(inputs: list[Any], attributes: Attributes) -> list[Array]:
    """Split, by sizes or into equal parts of which the last may be smaller."""
    x, axis = inputs[0], attributes.get("axis", 0)
    if len(inputs) > 1 and inputs[1] is not None:
        ends = np.cumsum(inputs[1])[:-1]
    else:
        size = -(-x.shape[axis] // attributes["num_outputs"])
        ends = np.arange(size, x.shape[axis], size)
    return list(np.split(x, ends, axis=axis))


def slice_(inputs: list[Any], _: Attributes) -> Array:
    """Slice. Raises ModelError for a negative step."""
    x, starts, ends = inputs[:3]
    axes = inputs[3] if len(inputs) > 3 and inputs[3] is not None else range(len(starts))
    steps = inputs[4] if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 0:
            raise ModelError("Slice with a negative step is not interpreted.")
        index[int(axis)] = slice(int(start), int(end), int(step))
    return np.asarray(x[tuple(index)])


def squeeze(inputs: list[Any], _: Attributes) -> Array:
    """Squeeze, of the axes given or of all of size 1."""
    axes = tuple(int(a) for a in inputs[1]) if len(inputs) > 1 else None
    return np.asarray(np.squeeze(inputs[0], axis=axes))


def gather(inputs: list[Any], attributes: Attributes) -> Array:
    """Gather. Raises IntegerOverflow for an index beyond the axis."""
    x, indices = inputs
    axis = attributes.get("axis", 0)
    low, high = extremes(indices)
    if low < -x.shape[axis] or high >= x.shape[axis]:
        raise IntegerOverflow(f"indices [{low}, {high}] of {x.shape[axis]} entries")
    return np.asarray(np.take(x, indices, axis=axis))


def expand(inputs: list[Any], _: Attributes) -> Array:
    """Expand: the shapes broadcast against each other."""
    x, shape = inputs
    return np.asarray(np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(map(int, shape)))))


def flatten(inputs: list[Any], attributes: Attributes) -> Array:
    """Flatten to two axes."""
    x, axis = inputs[0], attributes.get("axis", 1)
    return np.asarray(x.reshape(math.prod(x.shape[:axis]), -1))


def shape_of(inputs: list[Any], attributes: Attributes) -> Array:
    """Shape, from ``start`` to ``end``; int64."""
    sizes = inputs[0].shape[attributes.get("start", 0) : attributes.get("end")]
    return np.asarray(sizes, np.int64)


OPS: dict[str, Callable[[list[Any], Attributes], Any]] = {
    "Add": lambda i, _: exact(lambda x, y: x + y, *i),
    "Sub": lambda i, _: exact(lambda x, y: x - y, *i),
    "Mul": lambda i, _: exact(lambda x, y: x * y, *i),
    "Div": lambda i, _: divide(*i),
    "Abs": lambda i, _: absolute(*i),
    "BitShift": bit_shift,
    "BitwiseAnd": lambda i, _: np.bitwise_and(*i),
    "Cast": cast,
    "Clip": lambda i, _: np.clip(*i),
    "Max": lambda i, _: np.maximum(*i),
    "Min": lambda i, _: np.minimum(*i),
    "Less": lambda i, _: np.less(*i),
    "Greater": lambda i, _: np.greater(*i),
    "GreaterOrEqual": lambda i, _: np.greater_equal(*i),
    "Where": lambda i, _: np.where(*i),
    "ReduceSum": reduce_sum,
    "ReduceMax": reduce_max,
    "MatMulInteger": matmul_integer,
    "ConvInteger": conv_integer,
    "QuantizeLinear": quantize_linear,
    "DequantizeLinear": dequantize_linear,
    "Gather": gather,
    "Reshape": reshape,
    "Transpose": lambda i, a: np.transpose(i[0], a.get("perm")),
    "Split": split,
    "Slice": slice_,
    "Squeeze": squeeze,
    "Unsqueeze": lambda i, _: np.expand_dims(i[0], tuple(int(a) for a in i[1])),
    "Concat": lambda i, a: np.concatenate(i, axis=a["axis"]),
    "Expand": expand,
    "Flatten": flatten,
    "Identity": lambda i, _: i[0],
    "Shape": shape_of,
}
"""What each op computes, from its inputs and attributes."""
