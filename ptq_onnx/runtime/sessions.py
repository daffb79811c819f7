"""ONNX Runtime sessions whose errors are ours: one line, and nothing on stderr beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnxruntime as ort

from ptq_onnx.errors import ModelError, one_line
from ptq_onnx.runtime.packed import given as inputs_of
from ptq_onnx.runtime.packed import unpack

FATAL = 4
"""The severity from which on ONNX Runtime writes to stderr; what it raises need not be there."""


class Session(ort.InferenceSession):  # type: ignore[misc]
    """An ``InferenceSession`` that raises ModelError, with what ONNX Runtime said as its cause."""

    def __init__(
        self, model: str | bytes, options: ort.SessionOptions, *, providers: Sequence[Any]
    ) -> None:
        options.log_severity_level = FATAL
        try:
            super().__init__(model, options, providers=list(providers))
        except Exception as error:  # its exceptions share no base class
            raise ModelError(f"ONNX Runtime refuses the model: {one_line(error)}.") from error

    def run(self, *given: Any) -> list[Any]:
        """As ``InferenceSession.run``, also for one batch in which several inputs are packed.
        Raises ModelError."""
        names, feeds = given
        if len(feeds) == 1:
            (batch,) = feeds.values()
            if getattr(batch, "ndim", 0) == 4 and unpack(batch) is not None:
                feeds = inputs_of(self, batch)
        try:
            return list(super().run(names, feeds))
        except Exception as error:
            raise ModelError(f"ONNX Runtime cannot run the model: {one_line(error)}.") from error
