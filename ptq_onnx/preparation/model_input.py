"""A model as Python holds it: a path, a protobuf, an ``onnx_ir`` model, an exporter's program."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from ptq_onnx.errors import ModelError, PtqError
from ptq_onnx.files.held_folder import is_scratch, scratch_folder

Model = str | os.PathLike[str] | onnx.ModelProto | ir.Model
"""What functions take as a model; besides, what ``torch.onnx.export(dynamo=True)`` returns."""

NAME = "model.onnx"
"""What the report calls a model without a file."""
TAKEN = (
    "a model is the path of an .onnx file, an onnx.ModelProto, an onnx_ir.Model or what"
    " torch.onnx.export(dynamo=True) returns"
)


@contextmanager
def model_file(model: Any) -> Iterator[Path]:
    """The file of a model; one that has none gets one for as long as it is needed.

    Raises ModelError for anything that is no model.
    """
    if isinstance(model, str | os.PathLike):
        yield Path(model)
        return
    plain = _plain(model)
    with scratch_folder() as folder:
        path = folder / NAME
        _write(plain, path)
        try:
            yield path
        except PtqError as error:  # nobody knows the file that it names
            text = str(error).replace(f"Model {path}", "The model").replace(str(path), "the model")
            if text == str(error):
                raise
            raise type(error)(text) from error


def typed_name(path: str | Path) -> str | Path:
    """The path, or the name alone of a file that was there only as long as it was needed."""
    path = Path(path)
    return NAME if path.name == NAME and is_scratch(path.parent) else path


def _plain(model: Any) -> onnx.ModelProto | ir.Model:
    """The model in what an exporter returns; raises ModelError where there is none."""
    inner = model if isinstance(model, onnx.ModelProto | ir.Model) else None
    if inner is None and hasattr(model, "model_proto"):
        inner = getattr(model, "model", None)
    if isinstance(inner, onnx.ModelProto | ir.Model):
        return inner
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if any(base.__module__.startswith("torch.nn") for base in type(model).__mro__):
        raise ModelError(
            f"{kind} is a PyTorch module: export it to ONNX first, as in torch.onnx.export(module,"
            " (images,), 'model.onnx', dynamo=True)."
        )
    raise ModelError(f"{kind} is not a model: {TAKEN}.")


def _write(model: onnx.ModelProto | ir.Model, path: Path) -> None:
    if isinstance(model, ir.Model):
        from ptq_onnx.preparation import model_files as graphs

        graphs.save(model, path, check=False)
        return
    outside = [t.name for t in model.graph.initializer if t.external_data]
    if outside:
        raise ModelError(
            f"The ModelProto keeps weights in another file ('{outside[0]}'): give the path of its"
            " .onnx file, or load it with onnx.load(path), which reads them."
        )
    try:
        path.write_bytes(model.SerializeToString())
    except ValueError as error:
        raise ModelError(
            "The ModelProto is beyond the 2 GiB of a protobuf: save it with external data and give"
            " the path."
        ) from error
