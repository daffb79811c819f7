"""Models written piece by piece: never a second copy of the weights in memory."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from ptq_onnx.preparation.cleaning import SMALL, skeleton


def write_streamed(model: ir.Model, path: Path) -> None:
    """One file, its large weights one after the other: no second copy of all is made.

    A protobuf's fields may come in any order: those of the model, then the graph, whose large
    initializers are its last fields. Source: protobuf.dev, "Encoding".
    """
    proto, large = without_weights(model)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    heads = []
    for name, weight in large.items():
        described = onnx.TensorProto(name=name, data_type=int(weight.dtype))
        described.dims.extend(weight.shape.numpy())
        fields = described.SerializeToString() + field_head(RAW_DATA, weight.nbytes)
        heads.append(field_head(INITIALIZER, len(fields) + weight.nbytes) + fields)
    weights = sum(len(head) for head in heads) + sum(w.nbytes for w in large.values())
    with path.open("wb") as file:
        file.write(proto.SerializeToString())
        file.write(field_head(GRAPH, len(graph) + weights))
        file.write(graph)
        for head, weight in zip(heads, large.values(), strict=True):
            file.write(head)
            file.write(weight.tobytes())


GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER


INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER


RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER


def field_head(field: int, length: int) -> bytes:
    """What stands in a protobuf before a field of bytes: its number and type 2, the length."""
    out = bytearray()
    for number in (field << 3 | 2, length):
        while number > 127:
            out.append(number & 127 | 128)
            number >>= 7
        out.append(number)
    return bytes(out)


def without_weights(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """The model as protobuf without its large initializers, and those that are used by name."""
    proto = skeleton(model)
    inputs = {value.name for value in model.graph.inputs}
    kept: list[onnx.ValueInfoProto] = []
    described: list[onnx.ValueInfoProto] = []
    large: dict[str, ir.TensorProtocol] = {}
    for info in proto.graph.input:
        value = model.graph.initializers.get(info.name)
        if value is None or value.const_value is None or value.const_value.size <= SMALL:
            kept.append(info)
            continue
        if not value.uses() and not value.is_graph_output() and info.name not in inputs:
            continue  # ONNX Runtime drops it, and then misses it
        large[info.name] = value.const_value
        (kept if info.name in inputs else described).append(info)
    proto.graph.value_info.extend(described)
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    return proto, large
