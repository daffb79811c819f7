"""Second moments of what linears read, streamed through ONNX Runtime.

Per batch the graph itself computes the mean [K] and the scatter Σ (x - mean)ᵀ(x - mean)
[K, K] of all rows of a tensor [..., K]; only those leave ONNX Runtime, and are joined in
float64 (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances", 1979). Memory does not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ptq_onnx.calibration.statistics import copies_in
from ptq_onnx.errors import ModelError
from ptq_onnx.graph.formula import new_constant
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.preparation.model_sessions import open_session
from ptq_onnx.runtime.devices import CPU_ONLY, providers_for

Array = NDArray[np.float32]
Double = NDArray[np.float64]

LIMIT = 256 << 20
"""Bytes of float64 second moments that are held at a time; more tensors take another run."""


@dataclass
class Moments:
    """Running moments of rows x [K]: ``mean`` [K], ``scatter`` = Σ (x - mean)ᵀ(x - mean)."""

    mean: Double
    scatter: Double
    rows: int = 0

    @classmethod
    def empty(cls, channels: int) -> Moments:
        """No row seen yet."""
        return cls(np.zeros(channels), np.zeros((channels, channels)))

    def update(self, mean: Array, scatter: Array, rows: int) -> None:
        """Fold in the mean and scatter of ``rows`` more rows."""
        if rows == 0:
            return
        total = self.rows + rows
        step = mean.astype(np.float64).ravel() - self.mean
        self.scatter += scatter
        self.scatter += np.outer(step, step * (self.rows * rows / total))
        self.mean += step * (rows / total)
        self.rows = total

    @property
    def covariance(self) -> Double:
        """E[xᵀx] - E[x]ᵀE[x], [K, K]."""
        return self.scatter / max(self.rows, 1)

    @property
    def second_moment(self) -> Double:
        """E[xᵀx], [K, K]."""
        return self.covariance + np.outer(self.mean, self.mean)


def collect_moments(
    model: ir.Model,
    channels: Mapping[str, int],
    batches: Iterable[Array],
    *,
    counts: Mapping[str, Double] | None = None,
    limit: int = LIMIT,
    threads: int = 0,
    progress: Callable[[], Callable[[int], None]] | None = None,
) -> Iterator[dict[str, Moments]]:
    """The moments of the named tensors, whose last axis has so many ``channels``.

    They come in groups that need at most ``limit`` bytes (or are one tensor); the batches
    [B, C, H, W] are run once for each. ``counts``: by tensor [B, …, K] how much each row [...]
    counts, one in the mean; all alike where the tensor has no such shape. ``progress`` is called
    before each run, what it returns with the number of images done. Raises ModelError for NaN and
    infinity.
    """
    for group in groups(channels, limit):
        session, outputs = _open(model, group, counts or {}, threads)
        feed = session.get_inputs()[0].name
        wanted = [name for names in outputs.values() for name in names]
        found = {tensor: Moments.empty(size) for tensor, size in group.items()}
        advance = None if progress is None else progress()
        for batch in batches:
            values = dict(zip(wanted, session.run(wanted, {feed: batch}), strict=True))
            for tensor, names in outputs.items():
                mean, scatter, shape = (values[name] for name in names)
                if not (np.isfinite(mean).all() and np.isfinite(scatter).all()):
                    raise ModelError(
                        f"The second moments of tensor '{tensor}' are NaN or infinite on a"
                        " calibration image; check the model, or use --rounding nearest."
                    )
                found[tensor].update(mean, scatter, int(shape[0]))
            if advance is not None:
                advance(len(batch) // copies_in(batches))
        yield found


def groups(channels: Mapping[str, int], limit: int = LIMIT) -> list[dict[str, int]]:
    """The tensors in order, a new group wherever Σ 8 K² would exceed ``limit`` bytes."""
    result: list[dict[str, int]] = []
    room = 0
    for tensor, size in channels.items():
        room -= 8 * size * size
        if not result or room < 0:
            result.append({})
            room = limit - 8 * size * size
        result[-1][tensor] = size
    return result


def _open(
    model: ir.Model, channels: Mapping[str, int], counts: Mapping[str, Double], threads: int
) -> tuple[ort.InferenceSession, dict[str, tuple[str, str, str]]]:
    """A session of the model with (mean, scatter, shape of the rows) as outputs by tensor."""
    copy = graphs.to_standard(model)
    graph = copy.graph
    values = {str(v.name): v for v in graph.inputs}
    values.update({str(v.name): v for node in graph for v in node.outputs})
    outputs: dict[str, tuple[str, str, str]] = {}
    while graph.outputs:  # nothing behind the last tensor needs to run
        graph.outputs.pop()
    first = new_constant(graph, "moments/axis", np.array([0], np.int64))

    def add(op: str, name: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op, list(inputs), attributes, num_outputs=1)
        node.outputs[0].name = name
        integer = op == "Shape"
        node.outputs[0].dtype = ir.DataType.INT64 if integer else ir.DataType.FLOAT
        graph.append(node)
        return node.outputs[0]

    for tensor, size in channels.items():
        name = f"moments/{tensor}"
        to = new_constant(graph, f"{name}/to", np.array([-1, size], np.int64))
        value, root = values[tensor], None
        if _fits(counts.get(tensor), value):
            count = np.asarray(counts[tensor], np.float32)[..., None]
            root = new_constant(graph, f"{name}/root", np.sqrt(count))
            often = new_constant(graph, f"{name}/count", count)
            value = add("Mul", f"{name}/weighted", value, often)
        rows = add("Reshape", f"{name}/rows", value, to)
        mean = add("ReduceMean", f"{name}/mean", rows, first, keepdims=1)
        if root is None:
            centred = add("Sub", f"{name}/centred", rows, mean)
        else:
            off = add("Sub", f"{name}/off", values[tensor], mean)
            off = add("Mul", f"{name}/rooted", off, root)
            centred = add("Reshape", f"{name}/centred", off, to)
        turned = add("Transpose", f"{name}/turned", centred, perm=[1, 0])
        scatter = add("MatMul", f"{name}/scatter", turned, centred)
        shape = add("Shape", f"{name}/shape", rows)
        graph.outputs.extend([mean, scatter, shape])
        outputs[tensor] = (str(mean.name), str(scatter.name), str(shape.name))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.log_severity_level = 3
    return open_session(copy, options, providers_for(CPU_ONLY)), outputs


def _fits(count: Double | None, value: ir.Value) -> bool:
    """True for a number for each position of a value [B, …, K]."""
    if count is None or value.shape is None:
        return False
    return tuple(value.shape[1:-1]) == count.shape
