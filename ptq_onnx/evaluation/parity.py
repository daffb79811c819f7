"""Whether a rewritten float model still computes what the original does, in every run.

Fusing, forms and equalisation are exact on paper; here they are held to it where they are used.
The model as it was loaded and the rewritten one run on the same few calibration images in ONNX
Runtime. How far an output b is off from a:

    √(Σ (a - b)² / Σ a²)

over all its elements on all images; of an output of whole numbers, such as classes by ArgMax, the
part of its elements that differ, but for one, which a tie decides. Of several outputs the worst
counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ptq_onnx.errors import ModelError, one_line
from ptq_onnx.preparation.model_sessions import open_plain
from ptq_onnx.preparation.signature import feeds

Array = NDArray[np.float32]
Outputs = list[NDArray[Any]]

IMAGES = 4
"""Images that are compared on, at most; a model with a larger fixed batch takes that."""
BOUND = 1e-3
"""What the order of sums explains; where the original has other floats, twice what converting it
to float32 made of it."""
WRONG = 0.1
"""Fused models that are further off than this are refused."""
LARGEST = 1e9
"""What stands for infinity in the report."""


@dataclass(frozen=True)
class Off:
    """How far the worst output is off, and its name."""

    value: float
    output: str

    def __str__(self) -> str:
        return f"off by {self.value:.1e} of output '{self.output}'"


@dataclass(frozen=True)
class Parity:
    """What the report says: how far the fused and the rewritten model are off.

    ``original``: False where the original does not run in ONNX Runtime, and the fused model
    stands in for it. ``undone``: the rewrites that were, being further off than ``bound``.
    """

    images: int
    original: bool
    bound: float
    fused: float | None
    rewritten: float | None
    output: str
    undone: tuple[str, ...] = ()


class Reference:
    """The outputs of a model as loaded on a few images, and what others are off from them."""

    def __init__(
        self, path: Path, fused: ir.Model, batches: Sequence[Array], count: int, threads: int = 0
    ) -> None:
        """``batches``: images as the model takes them, ``count`` in all. Raises ModelError where
        the fused model is another function than the original."""
        self.batches, self.count, self.threads = list(batches), count, threads
        self.notes: list[str] = []
        self.fused: Off | None = None
        self.bound = BOUND
        try:
            original = _opened(path, threads)
            self.expected = [_run(original, batch) for batch in self.batches]
        except Exception as error:  # whatever the runtime does not take
            self.notes.append(
                "The original does not run in ONNX Runtime, so that rewrites were compared with"
                f" the fused model alone ({one_line(error)[:200]})."
            )
            session = open_plain(fused, threads)
            self.expected = [_run(session, batch) for batch in self.batches]
            return
        self.fused = self.off(fused)
        self.bound = max(BOUND, 2 * self.fused.value)
        said = f"cleaned and fused, it is {self.fused} on {count} calibration images"
        if self.fused.value > WRONG:
            raise ModelError(
                f"Model {path}: {said}, so that it is no longer the same function; nothing was"
                " quantized. Please report it with the model."
            )
        if self.fused.value > BOUND:
            self.notes.append(f"Against the original: {said} (expected: at most {BOUND:.0e}).")

    def off(self, model: ir.Model) -> Off:
        """How far the model is off; infinitely, where it does not run or has other outputs."""
        names = [str(v.name) for v in model.graph.outputs]
        sums = np.zeros((2, len(names)))
        try:
            session = open_plain(model, self.threads)
            for batch, wanted in zip(self.batches, self.expected, strict=True):
                pairs = zip(wanted, _run(session, batch), strict=True)
                sums += np.array([powers(one, other) for one, other in pairs]).T
        except Exception:  # a rewrite that breaks the graph is wrong, too
            return Off(LARGEST, names[0])
        noise, signal = sums
        whole = np.array([a.dtype.kind in "iub" for a in self.expected[0]])
        noise = np.where(whole, np.maximum(noise - 1, 0), noise)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = noise / signal
            values = np.where(noise == 0, 0.0, np.where(whole, ratio, np.sqrt(ratio)))
        worst = int(np.argmax(values))
        return Off(float(min(values[worst], LARGEST)), names[worst])

    def accepts(self, off: Off) -> bool:
        """Whether the order of sums explains it."""
        return off.value <= self.bound


def _opened(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(session: ort.InferenceSession, batch: Array) -> Outputs:
    found: Outputs = session.run(None, feeds(session.get_inputs(), batch))
    return found


def powers(one: NDArray[Any], other: NDArray[Any]) -> tuple[float, float]:
    """Σ (a - b)² and Σ a²; where both are the same infinity, or no number, nothing is off. Of
    whole numbers how many differ, and how many there are."""
    if one.shape != other.shape:
        return np.inf, 1.0
    if one.dtype.kind in "iub":
        return float(np.sum(one != other)), float(one.size)
    a, b = one.astype(np.float64), other.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        noise = float(np.sum(np.where(same, 0, a - b) ** 2))
    return (noise if np.isfinite(noise) else np.inf), float(np.sum(a[np.isfinite(a)] ** 2))
