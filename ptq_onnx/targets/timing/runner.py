"""What a runtime has to offer to be timed."""

from __future__ import annotations

from typing import Protocol

from ptq_onnx.targets.timing.timed_model import Subject

AS_WRITTEN = "as written"
"""The precision of the file itself: float32 stays float32, int8 products are int8."""


class Runner(Protocol):
    """One model at one batch size, its input in place."""

    @property
    def memory(self) -> int | None:
        """Bytes of the device's memory it holds; None where its process tells."""

    def run(self) -> None:
        """One inference; it is over when this returns. Raises ModelError."""


class Runtime(Protocol):
    """What opens model files.

    ``half``: the 16-bit type it can compute a float32 file in (``fp16``, ``bf16``), None where
    there is none; ``half_note`` says why.
    """

    name: str
    version: str
    device: str
    on_gpu: bool
    half: str | None
    half_note: str

    def open(self, subject: Subject, batch: int, *, threads: int, precision: str) -> Runner | None:
        """A runner, ``precision`` being :data:`AS_WRITTEN` or :attr:`half`.

        ``threads`` 0: the runtime decides. None where it cannot give this file that precision.
        Raises ModelError for a file that it refuses.
        """
