"""Sessions of models in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from ptq_onnx.graph.expansions import to_standard
from ptq_onnx.preparation import sizes
from ptq_onnx.preparation.streamed import without_weights
from ptq_onnx.runtime.devices import CPU
from ptq_onnx.runtime.sessions import Session


def open_plain(model: ir.Model, threads: int = 0) -> ort.InferenceSession:
    """A session for a few images, without the packed copies of the weights, which would take
    memory and time. Raises ModelError."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_prepacking", "1")
    return open_session(to_standard(model), options)


def open_session(
    model: ir.Model, options: ort.SessionOptions, providers: Sequence[Any] = (CPU,)
) -> ort.InferenceSession:
    """An ONNX Runtime session of a model in standard form, on the CPU or where ``providers`` say.

    The weights of large models are handed over where they are, not in a protobuf.
    """
    if sizes.serialized_size(model) <= min(sizes.SHARED_LIMIT, sizes.EXTERNAL_LIMIT):
        content = ir.to_proto(model).SerializeToString()
        return Session(content, options, providers=providers)
    proto, large = without_weights(model)
    names, weights = [], []
    for name, weight in large.items():
        array = np.ascontiguousarray(weight.numpy())
        names.append(name)
        weights.append(ort.OrtValue.ortvalue_from_numpy(array))
        tensor = proto.graph.initializer.add()
        tensor.name, tensor.data_type = name, int(weight.dtype)
        tensor.dims.extend(array.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", "memory"), ("offset", "0"), ("length", str(array.nbytes))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, text
    options.add_external_initializers(names, weights)
    session = Session(proto.SerializeToString(), options, providers=providers)
    session.weights = weights  # they must live as long as the session
    return session
