"""How large a model is: its file, and the files beside it that hold its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from ptq_onnx.errors import ModelError
from ptq_onnx.files.unchanged import kept_while_unchanged


def model_bytes(path: str | Path) -> int:
    """Bytes of an ONNX file and of the data files that it names, each once.

    A file beside it that the model does not name counts nothing, whatever it is called; a data
    file that is missing neither. Raises ModelError.
    """
    path = Path(path)
    files = {path.resolve(), *(f.resolve() for f in data_files(path))}
    return sum(file.stat().st_size for file in files if file.is_file())


@kept_while_unchanged
def data_files(path: Path) -> tuple[Path, ...]:
    """The files that hold external data of a model, as it names them (``location``), in the order
    of their first tensor. Raises ModelError."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ModelError(f"Model {path} cannot be read: {type(error).__name__}.") from error
    nodes = [node for function in model.functions for node in function.node]
    tensors = [*_of_graph(model.graph), *_of_nodes(nodes)]
    names = dict.fromkeys(
        entry.value
        for tensor in tensors
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    )
    return tuple(path.parent / name for name in names)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """Constants of nodes, and of the graphs inside them."""
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from _of_graph(graph)
