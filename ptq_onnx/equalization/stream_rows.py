"""Rows of a stream's tensors, and of what norms make of them, from one run of the images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.calibration.product_samples import RowSample, Wanted, collect_samples
from ptq_onnx.equalization.rotation import affine_of, channels_last
from ptq_onnx.equalization.stream_parts import Stream

Double = NDArray[np.float64]

LEAST_VARIANCE = 1e-6
"""Of a row, beside the mean of all rows: what a norm adds to it is about as small."""


@dataclass(frozen=True)
class Rows:
    """Rows [R, D] of a tensor of a stream, and of what its norm makes, [R, D].

    ``counts`` [R]: how many rows of all each stands for, the sum is one; ``power`` [R]: that over
    each row's variance.
    """

    tensor: str
    stream: Double
    normed: Double
    counts: Double
    power: Double

    @classmethod
    def of(cls, tensor: str, sample: RowSample) -> Rows:
        """The rows of a sample, and their weights."""
        rows = sample.rows.astype(np.float64)
        counts = sample.weight / sample.weight.sum()
        variance = rows.var(axis=1)
        centred = rows - rows.mean(axis=1, keepdims=True)
        normed = centred / np.maximum(np.sqrt(variance)[:, None], 1e-12)
        power = counts / (variance + LEAST_VARIANCE * max(float(variance.mean()), 1e-30))
        return cls(tensor, rows, normed, counts, power)

    def turned(self, matrix: Double | None) -> Rows:
        """The rows of the turned stream."""
        if matrix is None:
            return self
        return replace(self, stream=self.stream @ matrix, normed=self.normed @ matrix)


def read_by_norms(stream: Stream) -> list[str]:
    """The names of the tensors that the stream's norms read."""
    return [str(v.name) for n in stream.norms if (v := n.inputs[0]) is not None]


def collect_rows(
    model: ir.Model,
    streams: Iterable[Stream],
    batches: Iterable[Any],
    threads: int,
    progress: Callable[[int], None] | None,
) -> dict[str, RowSample]:
    """Samples of what the streams' norms read, by tensor; ``batches`` are run once."""

    def by_width(width: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        return lambda array: array.reshape(-1, width)

    wanted: dict[str, Any] = {}
    for stream in streams:
        for norm in stream.norms:
            value = norm.inputs[0]
            assert value is not None
            wanted[str(value.name)] = (by_width(stream.width), None)
    found, _ = collect_samples(
        model, Wanted(wanted, {}), batches, threads=threads, progress=progress
    )
    return found


def sensitivities(stream: Stream) -> dict[str, Double]:
    """How much an error in a channel of a tensor [D] changes what reads it through its norm:
    γ_c² Σ_n W_cn², by tensor, one on average; pieces side by side together."""
    found: dict[str, Double] = {}
    for norm in stream.norms:
        scale, _ = affine_of(norm)
        power = np.zeros(len(scale))
        for reader, before in stream.readers:
            if before is norm:
                power += (channels_last(reader).reshape(-1, len(scale)) ** 2).sum(axis=0)
        each = scale**2 * (power if power.any() else 1.0)
        each = each.reshape(-1, stream.width).mean(axis=0)
        value = norm.inputs[0]
        assert value is not None
        name = str(value.name)
        found[name] = found.get(name, 0.0) + each / max(float(each.mean()), 1e-300)
    return found
