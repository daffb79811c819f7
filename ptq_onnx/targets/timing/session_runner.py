"""A model file in an ONNX Runtime session, as something that can be timed."""

from __future__ import annotations

from collections.abc import Mapping

import onnxruntime as ort

from ptq_onnx.errors import ModelError, one_line
from ptq_onnx.evaluation.network import Model, session
from ptq_onnx.targets.timing.timed_model import Subject


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
        """One inference, its outputs waited for. Raises ModelError."""
        try:
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        except Exception as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> ModelError:
        return ModelError(f"Model {self.path} fails in ONNX Runtime: {one_line(error)}.")
