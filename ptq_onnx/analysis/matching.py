"""Finds the tensors of a float model in any quantized file derived from it.

First by name: tools that insert QuantizeLinear and DequantizeLinear keep the names of what
ops make; QOperator files append ``_quantized``. Then by position: of the sums in the file
that have the right shape, those that are most like the float tensors, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from ptq_onnx.errors import ModelError
from ptq_onnx.evaluation.network import open_with_fp8
from ptq_onnx.numerics.dot import dot
from ptq_onnx.numerics.fake_quantize import dequantize
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.preparation.signature import feeds

Array = NDArray[np.float32]
How = Literal["name", "position"]

SUMS = frozenset({"Add", "Sum", "QLinearAdd", "SkipLayerNormalization"})
"""Ops that may make the residual stream."""
OUTPUT_SCALE = {
    "QLinearAdd": 6, "QLinearMul": 6, "QLinearConv": 6, "QLinearMatMul": 6, "QGemm": 7,
    "QLinearSigmoid": 3, "QLinearLeakyRelu": 3, "QLinearSoftmax": 3, "QLinearConcat": 0,
    "QLinearGlobalAveragePool": 3, "QLinearAveragePool": 3, "QLinearReduceMean": 3,
    "QuantizeLinear": 1,
}  # fmt: skip
"""Which input of an op is the scale of its output; the zero point is the next."""
SUFFIXES = ("", "_quantized", "_QuantizeLinear_Output")
ALIKE = 0.5
"""A tensor found by position has at least this cosine with the float one."""


class Tapped:
    """A quantized file whose inner tensors can be read, dequantized where they are codes.

    ``specs``: what codes mean that have no scale in the file (of the target integer), by the
    float model's tensor.
    """

    def __init__(
        self, path: Path, threads: int = 0, specs: Mapping[str, TensorSpec] | None = None
    ) -> None:
        self.path, self._threads = path, threads
        self._specs = specs or {}
        try:
            self._model = onnx.load(str(path))
        except Exception as error:
            raise ModelError(f"Model {path} cannot be read: {type(error).__name__}.") from error
        graph = self._model.graph
        self.made = {name: node for node in graph.node for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def named(self, tensor: str) -> str | None:
        """The tensor that the file calls by that name, or by it and a suffix of codes; codes
        only where their scale is known."""
        for suffix in SUFFIXES:
            name = tensor + suffix
            known = not suffix or tensor in self._specs
            if name in self.made and (known or self._scale_of(name) is not None):
                return name
        return None

    def sums(self) -> list[str]:
        """Outputs of ops that add, in graph order."""
        nodes = (n for n in self._model.graph.node if n.op_type in SUMS)
        return [name for node in nodes for name in node.output if name]

    def quantized_ops(self) -> dict[str, int]:
        """How many ops of each kind compute on codes, or make or read them."""
        found: dict[str, int] = {}
        for node in self._model.graph.node:
            kind = node.op_type
            if kind in ("QuantizeLinear", "DequantizeLinear") or kind.startswith(("QLinear", "QGemm")) or "Integer" in kind:  # fmt: skip  # noqa: E501
                found[kind] = found.get(kind, 0) + 1
        return dict(sorted(found.items()))

    def session(self, tensors: Sequence[str]) -> Reader:
        """Opens the file with these tensors as outputs. Raises ModelError."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        outputs: dict[str, str] = {}
        own = {o.name for o in model.graph.output}
        for tensor in tensors:
            outputs[tensor] = self._tap(model.graph, tensor)
            if outputs[tensor] not in own:
                model.graph.output.append(onnx.ValueInfoProto(name=outputs[tensor]))
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self._threads
        try:
            opened = open_with_fp8(model.SerializeToString(), options, ["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"Model {self.path} is refused by ONNX Runtime: {reason}") from error
        codes = {
            tensor + suffix: spec
            for tensor, spec in self._specs.items()
            for suffix in SUFFIXES[1:]
            if outputs.get(tensor + suffix) == tensor + suffix
        }
        return Reader(opened, outputs, codes)

    def _tap(self, graph: onnx.GraphProto, tensor: str) -> str:
        """The name to read a tensor by: its own, or that of a DequantizeLinear behind codes."""
        scale = self._scale_of(tensor)
        if scale is None:
            return tensor
        name = f"{tensor}/tapped"
        inputs = [tensor, *scale]
        graph.node.append(onnx.helper.make_node("DequantizeLinear", inputs, [name]))
        return name

    def _scale_of(self, tensor: str) -> list[str] | None:
        """Scale and zero point of a tensor of codes; None for floats."""
        for node in self._readers.get(tensor, []):
            if node.op_type == "DequantizeLinear" and node.input[0] == tensor:
                return list(node.input[1:3])
        node = self.made[tensor]
        place = OUTPUT_SCALE.get(node.op_type)
        return None if place is None else list(node.input[place : place + 2])


class Reader:
    """Reads tapped tensors of a file, batch by batch; ``codes``: what integers mean."""

    def __init__(
        self,
        session: ort.InferenceSession,
        outputs: Mapping[str, str],
        codes: Mapping[str, TensorSpec],
    ) -> None:
        self._session, self._outputs = session, dict(outputs)
        self._codes = codes
        self.integers: set[str] = set()
        """Tensors of integers without a scale, as seen so far: no values to compare."""
        self._input = session.get_inputs()[0]
        size = self._input.shape[0]
        self._fixed = size if isinstance(size, int) and size > 0 else None

    def run(self, batch: Array) -> dict[str, Array]:
        """The tensors of images [B, C, H, W], as float32 [B, …]; integers as they are where
        nothing tells their scale."""
        size = self._fixed or len(batch)
        parts: list[list[Array]] = []
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            missing = size - len(part)
            if missing:
                part = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
            names = list(self._outputs.values())
            found: list[Any] = self._session.run(names, feeds(self._session.get_inputs(), part))
            values = [self._value(t, f) for t, f in zip(self._outputs, found, strict=True)]
            parts.append([v[: size - missing] for v in values])
        return {
            tensor: np.concatenate([p[i] for p in parts]) for i, tensor in enumerate(self._outputs)
        }

    def _value(self, tensor: str, found: Any) -> Array:
        """The numbers that a tensor stands for."""
        array = np.asarray(found)
        if array.dtype.kind not in "iub":
            return np.asarray(array, np.float32)
        if tensor in self._codes:
            return dequantize(array.astype(np.int32), self._codes[tensor])
        self.integers.add(tensor)
        return np.asarray(array, np.float32)


def match(
    tapped: Tapped, wanted: Mapping[str, Array], batch: Array
) -> dict[str, tuple[str, How] | None]:
    """For each float tensor (in graph order, with its values on ``batch``): the tensor of the
    file that stands for it, and how it was found."""
    names = {tensor: tapped.named(tensor) for tensor in wanted}
    by_name = [name for name in names.values() if name is not None]
    shapes = {}
    if by_name:
        shapes = {k: v.shape for k, v in tapped.session(by_name).run(batch).items()}
    found: dict[str, tuple[str, How] | None] = {}
    for tensor, name in names.items():
        fits = name is not None and shapes[name] == wanted[tensor].shape
        found[tensor] = (name, "name") if fits and name is not None else None
    left = [tensor for tensor, one in found.items() if one is None]
    candidates = tapped.sums() if left else []
    if candidates:
        reader = tapped.session(candidates)
        values = reader.run(batch)
        candidates = [name for name in candidates if name not in reader.integers]
    if candidates:
        likeness = np.array(
            [[_cosine(wanted[tensor], values[name]) for name in candidates] for tensor in left]
        )
        for tensor, place in zip(left, in_order(likeness), strict=True):
            if place is not None:
                found[tensor] = candidates[place], "position"
    return found


def in_order(likeness: NDArray[np.float64]) -> list[int | None]:
    """For every row the column that it goes with, columns ascending, so that the sum of
    likenesses of at least ``ALIKE`` is largest; None for rows that go with none."""
    rows, columns = likeness.shape
    best = np.zeros((rows + 1, columns + 1))
    gain = np.where(likeness >= ALIKE, likeness, 0.0)
    for r in range(rows - 1, -1, -1):
        for c in range(columns - 1, -1, -1):
            taken = gain[r, c] + best[r + 1, c + 1] if gain[r, c] > 0 else -1.0
            best[r, c] = max(taken, best[r + 1, c], best[r, c + 1])
    out: list[int | None] = [None] * rows
    r = c = 0
    while r < rows and c < columns:
        if gain[r, c] > 0 and best[r, c] == gain[r, c] + best[r + 1, c + 1]:
            out[r] = c
            r, c = r + 1, c + 1
        elif best[r, c] == best[r, c + 1]:
            c += 1
        else:
            r += 1
    return out


def _cosine(one: Array, other: Array) -> float:
    if one.shape != other.shape:
        return 0.0
    a, b = one.ravel().astype(np.float64), other.ravel().astype(np.float64)
    scale = float(np.sqrt(dot(a, a) * dot(b, b)))
    return 0.0 if scale == 0 else dot(a, b) / scale
