"""A model file that is timed: its inputs, its size, and whether anything in it is quantized."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx import graph as graphs
from ptq_onnx.errors import ModelError

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
        """Standard normal inputs from a fixed seed; zeros where an input takes no floats."""
        random = np.random.default_rng(SEED)
        shapes = self.shapes(batch)
        return {
            i.name: random.standard_normal(shapes[i.name], dtype=np.float32).astype(i.dtype)
            if i.dtype.kind == "f"
            else np.zeros(shapes[i.name], i.dtype)
            for i in self.inputs
        }


def read_subject(path: str | Path) -> Subject:
    """Read what timing needs to know of a file. Raises ModelError."""
    path = Path(path)
    model = graphs.outline(path)
    free = [v for v in model.graph.inputs if not v.is_initializer()]
    if not free:
        raise ModelError(f"Model {path} has no input; there is nothing to time.")
    ops = {node.op_type for node in _nodes(model)}
    beside = {
        Path(v.const_value.path)
        for v in model.graph.initializers.values()
        if isinstance(v.const_value, ir.ExternalTensor)
    }
    files = [path, *(_beside(path, other) for other in sorted(beside))]
    return Subject(
        path=path,
        inputs=tuple(_input(v, path) for v in free),
        quantized=bool(ops & QUANTIZED_OPS),
        bytes=sum(file.stat().st_size for file in files),
        digest=_digest(files),
    )


def _digest(files: list[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _beside(path: Path, other: Path) -> Path:
    found = path.parent / other
    if not found.is_file():
        raise ModelError(f"Model {path}: its data file '{other}' is missing; put it beside it.")
    return found


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
    unknown = [CHANNELS, SIDE, SIDE] if len(rest) == 3 else [SIDE] * len(rest)
    sides = (d if isinstance(d, int) else u for d, u in zip(rest, unknown, strict=True))
    return Input(name, dtype, first if isinstance(first, int) else None, tuple(sides))
