"""ONNX Runtime: CUDA where it really loads, else the CPU."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort

from ptq_onnx.errors import ModelError, one_line
from ptq_onnx.runtime.devices import cuda_works
from ptq_onnx.targets.timing.runner import AS_WRITTEN
from ptq_onnx.targets.timing.session_runner import SessionRunner
from ptq_onnx.targets.timing.timed_model import Subject


class OnnxRuntime:
    """The default runtime."""

    name = "onnxruntime"

    def __init__(self) -> None:
        self.version: str = ort.__version__
        self.on_gpu = cuda_works()
        self.device = "CUDA" if self.on_gpu else "CPU"
        self.half = "fp16" if self.on_gpu else None
        self.half_note = (
            ""
            if self.on_gpu
            else "No fp16 column: onnxruntime's CPU provider computes no fp16; it converts to"
            " float32 and back."
        )

    def open(
        self, subject: Subject, batch: int, *, threads: int, precision: str
    ) -> SessionRunner | None:
        """A runner of the file as it is written, or with its floats in 16 bits; None for a
        quantized file in 16 bits."""
        device = "cuda" if self.on_gpu else "cpu"
        if precision == AS_WRITTEN:
            return SessionRunner(subject, batch, threads, device=device)
        if subject.quantized:
            return None
        return SessionRunner(subject, batch, threads, device=device, model=halved(subject))


def halved(subject: Subject) -> bytes:
    """The float32 file in float16, its inputs and outputs left as they are."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    try:
        model: Any = convert_float_to_float16(onnx.load(subject.path), keep_io_types=True)
        return bytes(model.SerializeToString())
    except Exception as error:
        raise ModelError(
            f"Model {subject.path} cannot be converted to float16: {one_line(error)}."
        ) from error


def load() -> OnnxRuntime:
    """The runtime; it is always there."""
    return OnnxRuntime()
