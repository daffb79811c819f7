"""A model as it is in here, ops of ours and all, in files that other processes of ours map."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ptq_onnx.preparation.model_files import map_external_data


def write_shared(model: ir.Model, path: Path) -> Path:
    """Write it, with its weights beside it."""
    ir.save(model, path, format="protobuf", external_data=f"{path.name}.data")
    return path


def read_shared(path: Path) -> ir.Model:
    """The same model; its weights are views of the file."""
    model = ir.load(path)
    map_external_data(model, path)
    return model
