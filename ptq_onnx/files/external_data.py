"""The files that a model keeps its weights in, by the names that its own file gives them."""

from __future__ import annotations

from pathlib import Path

import onnx

KEY = "location"


def locations(model: Path) -> set[str]:
    """Names of the files of weights; none where there is no model. Reads no weights."""
    try:
        proto = onnx.load_model(model, format="protobuf", load_external_data=False)
    except Exception:  # damaged, or something else: protobuf's errors share no base class
        return set()
    return {entry.value for entry in _entries(proto)}


def relocate(model: Path, name: str) -> None:
    """Let a model look for its weights in the file ``name`` beside it."""
    proto = onnx.load_model(model, format="protobuf", load_external_data=False)
    for entry in _entries(proto):
        entry.value = name
    model.write_bytes(proto.SerializeToString())


def _entries(proto: onnx.ModelProto) -> list[onnx.StringStringEntryProto]:
    tensors = proto.graph.initializer
    return [entry for tensor in tensors for entry in tensor.external_data if entry.key == KEY]
