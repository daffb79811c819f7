"""A model run over all batches with tensors as outputs, here or in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ptq_onnx.files.held_folder import scratch_folder
from ptq_onnx.preparation import sizes
from ptq_onnx.preparation.model_sessions import open_session
from ptq_onnx.runtime.devices import CPU_ONLY, providers_for
from ptq_onnx.runtime.packed import given
from ptq_onnx.runtime.processes import Processes, shared_threads
from ptq_onnx.runtime.sessions import Session

Array = NDArray[np.float32]
Taken = Callable[[Array, dict[str, Any]], Any]
"""Makes of a batch and its tensors by name what is kept of them; where there are several processes,
one of them calls it, so that it and its result must be such as can be sent."""


def tapped_session(model: ir.Model, threads: int) -> ort.InferenceSession:
    """A session of a standard model whose outputs are taps."""
    return open_session(model, _options(threads), providers_for(CPU_ONLY))


def copies_in(batches: Iterable[Array]) -> int:
    """How often each image stands in its batch (see ``pipeline.Batches``)."""
    return int(getattr(batches, "copies", 1))


def open_taps(
    model: ir.Model, tensors: Iterable[str], threads: int
) -> tuple[ort.InferenceSession, str, list[str]]:
    """A session of a standard model, which is changed, with the named tensors as outputs.

    Returns the session, the input's name, and the tensors without that.
    """
    names = add_outputs(model, tensors)
    session = tapped_session(model, threads)
    inputs = [str(i.name) for i in session.get_inputs()]
    return session, inputs[0], [tensor for tensor in names if tensor not in inputs]


def add_outputs(model: ir.Model, tensors: Iterable[str]) -> list[str]:
    """The tensors, which are outputs of the model from here on, where they are no input."""
    values = {v.name: v for v in model.graph.inputs}
    values.update({v.name: v for node in model.graph for v in node.outputs})
    outputs, names = {str(v.name) for v in model.graph.outputs}, list(tensors)
    for tensor in names:
        if tensor not in outputs and values[tensor].producer() is not None:
            model.graph.outputs.append(values[tensor])
    return names


def taken_in_order(
    model: ir.Model,
    wanted: Sequence[str],
    batches: Iterable[Array],
    take: Taken,
    *,
    threads: int,
    workers: int = 1,
) -> Iterator[tuple[Array, Any]]:
    """Each batch [B, C, H, W] with what ``take`` makes of the ``wanted`` outputs of a standard
    model, in the order of the batches, whatever the number of ``workers``. Raises ModelError."""
    if workers == 1:
        run = _taking(tapped_session(model, threads), wanted, take)
        for batch in batches:
            yield batch, run(batch)
        return
    with scratch_folder() as folder:
        path = folder / "tapped.onnx"
        _write(model, path)
        arguments = str(path), tuple(wanted), take, shared_threads(threads, workers)
        with Processes(workers, open_taking, *arguments) as processes:
            yield from processes.beside((batch, batch) for batch in batches)


def open_taking(
    path: str, wanted: Sequence[str], take: Taken, threads: int
) -> Callable[[Array], Any]:
    """What a process does with each batch."""
    session = Session(path, _options(threads), providers=providers_for(CPU_ONLY))
    return _taking(session, wanted, take)


def _taking(
    session: ort.InferenceSession, wanted: Sequence[str], take: Taken
) -> Callable[[Array], Any]:
    inputs = [str(i.name) for i in session.get_inputs()]
    names = [name for name in wanted if name not in inputs]

    def run(batch: Array) -> Any:
        feed = given(session, batch)
        values = session.run(names, feed) if names else []
        return take(batch, {**dict(zip(names, values, strict=True)), **feed})

    return run


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.log_severity_level = 3
    return options


def _write(model: ir.Model, path: Path) -> None:
    """The model as a file, whatever its size."""
    if sizes.serialized_size(model) <= min(sizes.SHARED_LIMIT, sizes.EXTERNAL_LIMIT):
        path.write_bytes(ir.to_proto(model).SerializeToString())
    else:
        ir.save(model, path, format="protobuf", external_data=f"{path.name}.data")
