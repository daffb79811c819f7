"""A model file that is timed: its inputs, its size, and whether anything in it is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.blocks.sites import image_input
from ptq_onnx.errors import ModelError
from ptq_onnx.files.digest import digest_of
from ptq_onnx.files.model_size import data_files, model_bytes
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.preparation.prepare import read_input
from ptq_onnx.preparation.signature import TO_LAST, channels_last
from ptq_onnx.preparation.validation import is_image

SEED = 0
SIDE = 224
"""What an axis of unknown size gets."""
CHANNELS = 3
QUANTIZED_OPS = frozenset(
    ("QuantizeLinear", "DequantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul",
     "QLinearConv", "DynamicQuantizeLinear", "MatMulNBits")
)  # fmt: skip

Feed = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Input:
    """One input: its type, and its axes after the batch; ``batch`` None: any batch size."""

    name: str
    dtype: np.dtype[Any]
    batch: int | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """A model file; ``bytes`` counts the weights it keeps in other files too."""

    path: Path
    inputs: tuple[Input, ...]
    quantized: bool
    bytes: int
    digest: str = ""
    """Of the file and of the weights beside it: equal for the same bytes."""

    @property
    def batch(self) -> int | None:
        """The only batch size it takes; None where it takes any."""
        return next((i.batch for i in self.inputs if i.batch is not None), None)

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """The shape of every input at a batch size."""
        return {i.name: (batch, *i.shape) for i in self.inputs}

    def feed(self, batch: int) -> Feed:
        """Standard normal inputs from a fixed seed, random bytes for uint8; zeros where an input
        takes something else."""
        random = np.random.default_rng(SEED)
        shapes = self.shapes(batch)
        found: Feed = {}
        for i in self.inputs:
            shape = shapes[i.name]
            if i.dtype.kind == "f":
                found[i.name] = random.standard_normal(shape, dtype=np.float32).astype(i.dtype)
            elif i.dtype == np.uint8:
                found[i.name] = random.integers(0, 256, shape, dtype=np.uint8)
            else:
                found[i.name] = np.zeros(shape, i.dtype)
        return found


def read_subject(path: str | Path) -> Subject:
    """Read what timing needs to know of a file. Raises ModelError."""
    path = Path(path)
    model = graphs.outline(path)
    free = [v for v in model.graph.inputs if not v.is_initializer()]
    if not free:
        raise ModelError(f"Model {path} has no input; there is nothing to time.")
    ops = {node.op_type for node in _nodes(model)}
    beside = data_files(path)
    for file in beside:
        if not file.is_file():
            raise ModelError(
                f"Model {path}: its data file '{file.name}' is missing; put it beside it."
            )
    if len(free) == 1 and is_image(free[0]):
        _fill(free[0], path)
    return Subject(
        path=path,
        inputs=tuple(_input(v, path) for v in free),
        quantized=bool(ops & QUANTIZED_OPS),
        bytes=model_bytes(path),
        digest=digest_of(path, *sorted(beside)),
    )


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _fill(image: ir.Value, path: Path) -> None:
    """Give dynamic axes of an image the sizes that the file's graph tells, where it does."""
    shape = list(image.shape or ())
    if all(isinstance(d, int) for d in shape[1:]):
        return
    try:
        known = list(image_input(read_input(path)).shape or ())
    except ModelError:
        return
    if channels_last(shape):
        known = [known[i] for i in TO_LAST]
    dims = (d if isinstance(d, int) else k for d, k in zip(shape[1:], known[1:], strict=True))
    image.shape = ir.Shape([shape[0], *dims])


def _input(value: ir.Value, path: Path) -> Input:
    name = str(value.name)
    if value.shape is None or len(value.shape) == 0 or value.dtype is None:
        raise ModelError(
            f"Model {path}: expected an input [batch, …] of known rank, got '{name}' without."
        )
    try:
        dtype = np.dtype(value.dtype.numpy())
    except TypeError:
        raise ModelError(
            f"Model {path}: input '{name}' is of type {value.dtype}, which cannot be fed."
        ) from None
    first, *rest = value.shape
    unknown = [SIDE] * len(rest)
    if len(rest) == 3:
        unknown = [SIDE, SIDE, CHANNELS] if channels_last(value.shape) else [CHANNELS, SIDE, SIDE]
    sides = (d if isinstance(d, int) else u for d, u in zip(rest, unknown, strict=True))
    return Input(name, dtype, first if isinstance(first, int) else None, tuple(sides))
