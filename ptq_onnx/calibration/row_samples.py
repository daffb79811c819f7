"""Rows of tensors, drawn from all images: a sample of fixed size, streamed.

A row holds all channels of one place: a token's channels, or of q, k, v the heads and channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.calibration.finite import check_finite
from ptq_onnx.calibration.statistics import copies_in, open_taps
from ptq_onnx.numerics.spec import Site
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.runtime.packed import given

Array = NDArray[np.float32]
Double = NDArray[np.float64]
Counting = Callable[[str, Sequence[int]], Array]
"""Given a tensor and the shape [B, …] of its places: how often each row counts, [n]."""

ROWS = 6400
"""Rows that are kept of a tensor."""
LIMIT = 512 << 20
"""Bytes of rows that are held at a time; more tensors take another run."""


class EvenSample:
    """``ROWS`` rows of a stream, every row as likely as another; memory is fixed."""

    def __init__(self, seed: int, count: int = ROWS) -> None:
        self._random, self._count = np.random.default_rng(seed), count
        self._part = np.random.default_rng((seed, 1))
        self._keys = np.zeros(0)
        self._kept = np.zeros((0, 0), np.float32)

    def add(self, rows: Array) -> None:
        """Fold in rows [n, C]."""
        keys = self._random.random(len(rows))
        if len(self._keys) >= self._count:
            new = np.flatnonzero(keys < self._keys.max())
            rows, keys = rows[new], keys[new]
        if not len(keys):
            return
        kept = self._kept if self._kept.size else rows[:0]
        self._kept, self._keys = np.concatenate([kept, rows]), np.concatenate([self._keys, keys])
        if len(self._keys) > self._count:
            least = np.argpartition(self._keys, self._count)[: self._count]
            self._kept, self._keys = self._kept[least], self._keys[least]

    def drawn(self, rows: Array, counts: Array) -> Array:
        """The rows [n, C], each as often as it counts, [n]; of a fraction, one more at random."""
        return np.repeat(rows, np.floor(counts + self._part.random(len(rows))).astype(int), axis=0)

    @property
    def rows(self) -> Array:
        """The sample [R, C]."""
        return self._kept


def channels_last(value: Array, axes: Sequence[int]) -> Array:
    """A tensor as rows [n, C]: the channel axes last and flat."""
    others = [axis for axis in range(value.ndim) if axis not in axes]
    moved = value.transpose(*others, *axes)
    return np.ascontiguousarray(moved).reshape(-1, int(np.prod([value.shape[a] for a in axes])))


def collect_rows(
    model: ir.Model,
    sites: Sequence[Site],
    batches: Iterable[Array],
    *,
    counting: Counting | None = None,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[dict[str, Array]]:
    """Samples [R, C] of the sites, by tensor, in groups of at most ``LIMIT`` bytes, each from
    another run of the batches [B, C, H, W].

    ``counting``: given a tensor and the shape [B, …] of its places, how often each row is there,
    [n]; None: once.

    Raises ModelError where a tensor is NaN or infinite (it names it).
    """
    for group in groups(sites):
        session, feed, names = open_taps(
            graphs.to_standard(model), [s.tensor for s in group], threads
        )
        samples = {s.tensor: EvenSample(seed) for seed, s in enumerate(group)}
        copies = copies_in(batches)
        for batch in batches:
            found = dict(zip(names, session.run(names, {feed: batch}), strict=True))
            found |= given(session, batch)
            check_finite(found, names)
            for site in group:
                value = found[site.tensor]
                value = value[: len(value) // copies]
                rows = channels_last(value, site.channel_axes)
                if counting is not None:
                    others = [n for a, n in enumerate(value.shape) if a not in site.channel_axes]
                    rows = samples[site.tensor].drawn(rows, counting(site.tensor, others))
                samples[site.tensor].add(rows)
            if progress is not None:
                progress(len(batch) // copies)
        yield {tensor: sample.rows for tensor, sample in samples.items()}


def row_means(
    model: ir.Model,
    tensors: Iterable[str],
    batches: Iterable[Array],
    counting: Counting,
    *,
    threads: int = 0,
) -> dict[str, Double]:
    """The mean [C] of the rows of tensors [B, …, C], each as often as it counts (see
    :func:`collect_rows`), from one run of the batches.

    Raises ModelError where a tensor is NaN or infinite (it names it).
    """
    session, feed, names = open_taps(graphs.to_standard(model), tensors, threads)
    sums: dict[str, Double] = {}
    counted: dict[str, float] = {}
    copies = copies_in(batches)
    for batch in batches:
        found = dict(zip(names, session.run(names, {feed: batch}), strict=True)) if names else {}
        found |= given(session, batch)
        check_finite(found, names)
        for tensor in tensors:
            value = found[tensor]
            value = value[: len(value) // copies]
            counts = counting(tensor, value.shape[:-1])
            more = counts.astype(np.float64) @ value.reshape(-1, value.shape[-1])
            sums[tensor] = sums.get(tensor, 0.0) + more
            counted[tensor] = counted.get(tensor, 0.0) + float(counts.sum(dtype=np.float64))
    return {tensor: total / counted[tensor] for tensor, total in sums.items()}


def groups(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites whose samples are held at a time, in their order; those of a block stay together."""
    found: list[list[Site]] = []
    held = 0
    for _, some in itertools.groupby(sites, key=lambda site: site.block):
        together = list(some)
        size = sum(4 * ROWS * channel_count(site) for site in together)
        if not found or held + size > LIMIT:
            found.append([])
            held = 0
        found[-1] += together
        held += size
    return found


def channel_count(site: Site) -> int:
    """How many values a row of the site has."""
    return int(np.prod([int(site.shape[axis]) for axis in site.channel_axes], dtype=np.int64))
