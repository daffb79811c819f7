"""Reads and writes .onnx files; the only place that does.

``load`` refuses what cannot be quantized, with one line that says why. ``save`` and
``serialize`` write standard ONNX: the fused ops of ours are expanded on a copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import Message
from onnx.external_data_helper import load_external_data_for_tensor

from ptq_onnx.errors import ModelError, one_line
from ptq_onnx.files.held_folder import held_folder
from ptq_onnx.files.unchanged import kept_while_unchanged
from ptq_onnx.graph.expansions import standardise, to_standard
from ptq_onnx.graph.onnxruntime_ops import refile
from ptq_onnx.graph.ordering import sort_nodes
from ptq_onnx.graph.sparse import write_out_sparse
from ptq_onnx.preparation import sizes
from ptq_onnx.preparation.cleaning import CleanReport, clean, flatten, skeleton
from ptq_onnx.preparation.signature import put_back
from ptq_onnx.preparation.streamed import write_streamed
from ptq_onnx.preparation.validation import validate
from ptq_onnx.telemetry import switch_off

switch_off()  # by its API too, where it is loaded by now

__all__ = [
    "CleanReport",
    "clean",
    "flatten",
    "inputs",
    "load",
    "map_external_data",
    "outline",
    "read",
    "save",
    "serialize",
    "serialize_own",
    "to_standard",
]


def load(path: str | Path) -> ir.Model:
    """Read and check a model: valid ONNX, one image input, finite weights, known ops.

    Raises :class:`ModelError` for anything else. Weights kept in files beside the model are
    mapped, not read.
    """
    model = read(path)
    validate(model, Path(path))
    return model


def read(path: str | Path) -> ir.Model:
    """Read any valid ONNX file, whether it can be quantized or not. Raises ModelError."""
    path = Path(path)
    proto = _parse(path)
    sort_nodes(proto.graph)
    refile(proto)
    _check_external_data(proto, path)
    try:
        write_out_sparse(proto.graph)
        model = ir.from_proto(proto)
    except Exception as error:
        raise ModelError(f"Model {path} cannot be read: {one_line(error)}.") from error
    _free_axes([*model.graph.inputs, *model.graph.outputs])
    map_external_data(model, path)
    _check(proto, model, path)
    try:
        _let_go(model)
    except ValueError as error:
        raise ModelError(f"Model {path} is not valid ONNX: {one_line(error)}.") from error
    return model


def outline(path: str | Path) -> ir.Model:
    """Nodes, names and shapes of any ONNX file; weights in files beside it stay there.

    For what reads a graph and runs none of it. Raises :class:`ModelError`.
    """
    path = Path(path)
    try:
        proto = _parse(path)
        sort_nodes(proto.graph)
        model = ir.from_proto(proto)
        _free_axes([*model.graph.inputs, *model.graph.outputs])
        return model
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"Model {path} cannot be read: {one_line(error)}.") from error


@kept_while_unchanged
def inputs(path: Path) -> tuple[ir.Value, ...]:
    """What an ONNX file takes, in order, without its weights; nothing else of it is looked at.

    Raises :class:`ModelError`.
    """
    proto = _parse(path).graph
    weights = {tensor.name for tensor in proto.initializer}
    try:
        found = [
            ir.serde.deserialize_value_info_proto(given, None)
            for given in proto.input
            if given.name not in weights
        ]
    except Exception as error:
        raise ModelError(f"Model {path} cannot be read: {one_line(error)}.") from error
    _free_axes(found)
    return tuple(found)


def save(model: ir.Model, path: str | Path, *, check: bool = True) -> None:
    """Write the model as standard ONNX, checked, and all at once or not at all.

    It takes the input that its file took, whatever form it has in here.

    Models beyond 1.9 GB keep their weights in ``<name>.data`` beside the file.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ModelError(f"Cannot write {path}: the folder {path.parent} does not exist.")
    if path.is_dir():
        raise ModelError(f"Cannot write {path}: it is a folder; give the name of a file.")
    standard = to_standard(model)
    put_back(standard)
    size = sizes.serialized_size(standard)
    try:
        with held_folder(path) as folder:
            new = folder / path.name
            if size <= min(sizes.SHARED_LIMIT, sizes.EXTERNAL_LIMIT):
                content = _to_bytes(standard)
                if check:
                    onnx.checker.check_model(content, full_check=True)
                new.write_bytes(content)
            else:
                if check:
                    onnx.checker.check_model(skeleton(standard), full_check=True)
                if size <= sizes.EXTERNAL_LIMIT:
                    write_streamed(standard, new)
                else:
                    weights = f"{path.name}.data"
                    ir.save(standard, new, format="protobuf", external_data=weights)
                    os.replace(folder / weights, path.with_name(weights))
            os.replace(new, path)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"Cannot write {path}: not valid ONNX: {one_line(error)}.") from error
    except onnx.shape_inference.InferenceError as error:
        raise ModelError(f"Cannot write {path}: shapes disagree: {one_line(error)}.") from error
    except OSError as error:
        raise ModelError(f"Cannot write {path}: {error.strerror or one_line(error)}.") from error


def serialize(model: ir.Model) -> bytes:
    """The bytes of the standard form, for an ONNX Runtime session."""
    return _to_bytes(to_standard(model))


def serialize_own(model: ir.Model) -> bytes:
    """As :func:`serialize`, of a model that nobody else has: it is changed."""
    return _to_bytes(standardise(model))


def _to_bytes(standard: ir.Model) -> bytes:
    if sizes.serialized_size(standard) > sizes.EXTERNAL_LIMIT:
        raise ModelError(
            f"The model holds {sizes.serialized_size(standard) / 1e9:.1f} GB of weights,"
            " more than fits one protobuf; save it to a file instead."
        )
    return bytes(ir.to_proto(standard).SerializeToString())


def _parse(path: Path) -> onnx.ModelProto:
    """The protobuf of a file that holds an ONNX graph."""
    if not path.exists():
        raise ModelError(f"Model {path} does not exist.")
    if not path.is_file():
        raise ModelError(f"Model {path} is not a file; give the .onnx file itself.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"Model {path} cannot be read: {error.strerror}.") from error
    if not content:
        raise ModelError(f"Model {path} is empty (0 bytes); export it again.")
    try:
        proto = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own, which need not be imported for this
        raise ModelError(
            f"Model {path} is not an ONNX file, or is cut off ({len(content)} bytes);"
            " export or copy it again."
        ) from error
    if not proto.HasField("graph") or not proto.graph.node:
        raise ModelError(f"Model {path} is not an ONNX model: it holds no graph.")
    wrong = _no_text(proto)
    if wrong is not None:
        raise ModelError(
            f"Model {path} is not valid ONNX: the name {wrong!r} is not UTF-8; export or copy it"
            " again."
        )
    return proto


def _no_text(message: Message) -> bytes | None:
    """The first string in a protobuf that is not UTF-8, which Python gets as bytes."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            texts = [value] if isinstance(value, str | bytes) else value
            wrong = next((t for t in texts if isinstance(t, bytes)), None)
        elif field.type == field.TYPE_MESSAGE:
            parts = [value] if isinstance(value, Message) else value
            wrong = next((w for w in map(_no_text, parts) if w is not None), None)
        else:
            continue
        if wrong is not None:
            return wrong
    return None


def _check_external_data(proto: onnx.ModelProto, path: Path) -> None:
    """Weights kept in other files must lie in the model's folder. Those of initializers are
    mapped later; others (attributes, small and rare) are read here."""
    folder = path.parent.resolve()
    initializers = {id(tensor) for tensor in proto.graph.initializer}
    for tensor in _tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        where = f"Model {path}: tensor '{tensor.name}'"
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        target = (folder / location.replace("\0", "/../")).resolve()
        if not location or Path(location).is_absolute() or not target.is_relative_to(folder):
            raise ModelError(
                f"{where}: its data file '{location}' is outside the model's folder;"
                " keep both in one folder."
            )
        if not target.is_file():
            raise ModelError(
                f"{where}: its data file '{location}' is missing; put it beside the model."
            )
        if id(tensor) in initializers:
            continue
        try:
            load_external_data_for_tensor(tensor, str(folder))
        except Exception as error:
            raise _unreadable(path, tensor.name, location, error) from error


def _unreadable(path: Path, name: str, location: str, error: Exception) -> ModelError:
    return ModelError(
        f"Model {path}: tensor '{name}': its data file '{location}' cannot be read:"
        f" {one_line(error)}."
    )


def map_external_data(model: ir.Model, path: Path) -> None:
    """Initializers in other files become views of the mapped file: nothing is copied."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        tensor.base_dir = str(path.parent.resolve())
        try:
            array = tensor.numpy()
        except Exception as error:
            raise _unreadable(path, str(value.name), str(tensor.location), error) from error
        value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)


def _free_axes(values: Iterable[ir.Value]) -> None:
    """A size below 1 of an input or output, as Paddle's exporters write it, is a dynamic one."""
    for value in values:
        dims = list(value.shape or ())
        if any(isinstance(d, int) and d < 1 for d in dims):
            value.shape = ir.Shape([None if isinstance(d, int) and d < 1 else d for d in dims])


def _let_go(model: ir.Model) -> None:
    """Give every tensor an array of its own, so that the protobuf need not stay in memory, nor
    be copied from at each look at a weight."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.serde.TensorProtoTensor):
            value.const_value = _own(value.const_value)
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for node in (n for graph in graphs for n in ir.traversal.RecursiveGraphIterator(graph)):
        for name, attribute in list(node.attributes.items()):
            if attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
                continue
            tensor = attribute.as_tensor()
            if isinstance(tensor, ir.serde.TensorProtoTensor):
                node.attributes[name] = ir.AttrTensor(name, _own(tensor), attribute.doc_string)


def _own(tensor: ir.serde.TensorProtoTensor) -> ir.TensorProtocol:
    if tensor.dtype == ir.DataType.STRING:
        return tensor
    shape = tensor.shape.numpy()
    try:
        if min(shape, default=0) < 0:
            raise ValueError("a dimension is negative")
        array = tensor.numpy()
    except Exception as error:  # data of another length, in a field that its type does not use, …
        raise ValueError(f"tensor '{tensor.name}' {list(shape)}: {one_line(error)}") from error
    return ir.Tensor(
        array,
        dtype=tensor.dtype,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers and the tensors in node attributes, of the graph and its functions."""
    yield from proto.graph.initializer
    for sparse in proto.graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for nodes in (proto.graph.node, *(f.node for f in proto.functions)):
        yield from _held(nodes)


def _held(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """Tensors in the attributes of nodes, and in the graphs that are their branches and bodies."""
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from graph.initializer
            yield from _held(graph.node)


def _check(proto: onnx.ModelProto, model: ir.Model, path: Path) -> None:
    """onnx's own checker; large weights, and those of other files, do not go through it."""
    external = any(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer)
    try:
        if external or sizes.serialized_size(model) > min(sizes.SHARED_LIMIT, sizes.EXTERNAL_LIMIT):
            onnx.checker.check_model(skeleton(model))
        else:
            onnx.checker.check_model(proto)
    except Exception as error:
        raise ModelError(f"Model {path} is not valid ONNX: {one_line(error)}.") from error
