"""Matrices for residual streams that are learned from gradients of the output.

Rows of what norms make, without γ and β, and E[g gᵀ] of them are taken from some images; every
eighth is held apart, and tells whether a learned matrix is better than none
(``numerics/learned_rotation.py``). Only for tensors with a range for each channel: with one scale
for a tensor of the stream, what is learned from some images is worse on others (docs/rotation.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from ptq_onnx.engine.output_weights import SOFTNESS, slopes
from ptq_onnx.engine.torch_form import TorchForm
from ptq_onnx.equalization.rotation import affine_of
from ptq_onnx.equalization.stream_parts import Stream
from ptq_onnx.equalization.streams import find_streams
from ptq_onnx.numerics.learned_rotation import expected_loss, learned_matrix
from ptq_onnx.progress import Advance, silent
from ptq_onnx.quantizers.importance import first_images, run_in_torch

Array = NDArray[np.float32]
Double = NDArray[np.float64]

IMAGES = 128
"""Images that go through the model and back."""
REST = 100
"""Steps of progress behind them."""
APART = 8
"""Every so many images one is held apart."""
ROWS = 60
"""Rows that are taken of an image …"""
MOST = 1 << 26
"""… and numbers of all rows of a stream, at most."""
ENOUGH = 0.98
"""Part of the expected loss that a learned matrix may leave at most."""


@dataclass(frozen=True)
class Learned:
    """Matrices [D, D] by number of the stream in graph order, and dB of the expected loss that each
    saves on images held apart. ``note``: why none is learned, where that is so."""

    matrices: Mapping[int, Double] = field(default_factory=dict)
    saved: Mapping[int, float] = field(default_factory=dict)
    note: str | None = None


NOTHING = Learned()


def learn_turns(model: ir.Model, batches: Iterable[Any], advance: Advance = silent) -> Learned:
    """A matrix for each stream of a float model that products need not turn anywhere, where that
    is better than none. ``batches`` [B, C, H, W]: the first ``IMAGES`` are used; ``advance`` is
    told the number of images done, then of hundredths of the rest."""
    streams = {i: s for i, s in enumerate(find_streams(model.graph)[0]) if not s.products}
    if not streams:
        return Learned()
    read = {i: _Read(stream) for i, stream in streams.items()}

    def measure(form: TorchForm) -> None:
        names = [name for one in read.values() for pair in one.made.items() for name in pair]
        outputs = [str(v.name) for v in model.graph.outputs]
        images = first_images(batches, IMAGES, advance)
        for found, slope in slopes(form, form.inputs[0], names, outputs, images, SOFTNESS):
            for one in read.values():
                one.add(found, slope)

    reason = run_in_torch(model, measure)
    if reason is not None:
        return Learned(note=f"Rotation: the matrix is drawn, not learned; {reason}.")
    matrices: dict[int, Double] = {}
    saved: dict[int, float] = {}
    for place, (number, one) in enumerate(read.items()):
        if (better := one.learned(part_of(advance, place, len(read)))) is not None:
            matrices[number], saved[number] = better
    return Learned(matrices, saved)


def part_of(advance: Advance, place: int, parts: int) -> Callable[[float], None]:
    """What is told how much of a part is done, of a whole of a hundred steps."""
    told = place * REST // parts

    def tell(done: float) -> None:
        nonlocal told
        now = int((place + done) * REST / parts)
        advance(now - told)
        told = now

    return tell


class _Read:
    """Rows and costs of one stream, of images to learn from and of those held apart."""

    def __init__(self, stream: Stream) -> None:
        norms = [n for n in stream.norms if n.inputs[0] is not None]
        self.made = {str(n.outputs[0].name): str(n.inputs[0].name) for n in norms if n.inputs[0]}
        self.scale = {str(n.outputs[0].name): affine_of(n)[0] for n in norms}
        self.whole = all(len(scale) == stream.width for scale in self.scale.values())
        self.rows: tuple[list[Array], list[Array]] = ([], [])
        size = (2, len(norms), stream.width, stream.width)
        self.costs: Array = np.zeros(size, np.float32)
        self.count = int(np.clip(MOST / (len(norms) * stream.width * IMAGES), 1, ROWS))
        self.random = torch.Generator().manual_seed(0)
        self.seen = 0

    def add(self, found: Mapping[str, torch.Tensor], slope: Mapping[str, torch.Tensor]) -> None:
        """Take rows of one image, and g gᵀ of all."""
        self.whole = self.whole and self.made.keys() <= slope.keys()
        if not self.whole:
            return
        apart = self.seen % APART == APART - 1
        rows, costs = [], []
        for made, read in self.made.items():
            values = found[read].detach()
            values = values.reshape(-1, values.shape[-1])
            picked = torch.randint(len(values), (self.count,), generator=self.random)
            values = values[picked]
            centred = values - values.mean(dim=1, keepdim=True)
            spread = values.std(dim=1, keepdim=True, unbiased=False).clamp_min(1e-12)
            rows.append((centred / spread).numpy())
            scale = torch.from_numpy(self.scale[made].astype(np.float32))
            steps = slope[made].reshape(-1, slope[made].shape[-1]) * scale
            costs.append((steps.T @ steps).numpy())
        self.rows[apart].append(np.stack(rows))
        self.costs[int(apart)] += np.stack(costs)
        self.seen += 1

    def learned(self, tell: Callable[[float], None]) -> tuple[Double, float] | None:
        """The matrix and dB that it saves on images held apart; None where that is nothing.
        ``tell`` is told the part that is done."""
        if not self.whole or not all(self.rows):
            return None
        rows, others = (np.concatenate(r, axis=1) for r in self.rows)
        costs, tested = self.costs
        matrix = learned_matrix(rows, costs, tell=tell)
        before = expected_loss(others, tested, np.eye(len(matrix), dtype=np.float32))
        after = expected_loss(others, tested, matrix.astype(np.float32))
        if not after < ENOUGH * before:
            return None
        return matrix, float(10 * np.log10(before / after))
