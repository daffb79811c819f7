"""ONNX Runtime sessions whose errors are ours: one line, and nothing on stderr beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import onnxruntime as ort

from ptq_onnx.errors import ModelError, one_line
from ptq_onnx.runtime.packed import given as inputs_of
from ptq_onnx.runtime.packed import unpack

ARENA = ort.OrtMemoryInfo(
    "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
)
FATAL = 4
"""The severity from which on ONNX Runtime writes to stderr; what it raises need not be there."""


def share_arena(options: ort.SessionOptions) -> None:
    """Let a session take its memory from an arena that the process keeps, in place of one of its
    own: hundreds of short sessions, one behind the other, need not ask the system for theirs."""
    _make_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")


@cache
def _make_arena() -> None:
    """The process' arena; it grows by what is asked for."""
    ort.create_and_register_allocator(ARENA, ort.OrtArenaCfg({"arena_extend_strategy": 1}))


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
