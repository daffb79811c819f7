"""ONNX Runtime: CUDA where it really loads, else the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnxruntime as ort

from ptq_onnx.benchmarking.runner import AS_WRITTEN
from ptq_onnx.benchmarking.subject import Subject
from ptq_onnx.errors import ModelError
from ptq_onnx.runtime import Model, cuda_works, session
from ptq_onnx.validation import one_line


class SessionRunner:
    """A session whose input and outputs stay on its device, so that copies are not timed."""

    memory: int | None = None

    def __init__(
        self,
        subject: Subject,
        batch: int,
        threads: int,
        *,
        device: str,
        model: Model | None = None,
        tensorrt: Mapping[str, str] | None = None,
    ) -> None:
        self.path = subject.path
        self._session = session(model or subject.path, threads, spin=False, tensorrt=tensorrt)
        self._binding = self._session.io_binding()
        try:
            for name, value in subject.feed(batch).items():
                there = ort.OrtValue.ortvalue_from_numpy(value, device, 0)
                self._binding.bind_ortvalue_input(name, there)
            for output in self._session.get_outputs():
                self._binding.bind_output(output.name, device)
        except Exception as error:  # its exceptions share no base class
            raise self._refusal(error) from error

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        except Exception as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> ModelError:
        return ModelError(f"Model {self.path} fails in ONNX Runtime: {one_line(error)}.")


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
