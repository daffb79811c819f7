"""Samples of fixed size of what products read, streamed through ONNX Runtime.

Of a linear's input, rows: the ``EXTREME`` with the largest values of all images, which decide
what a range clips and are too rare for a plain sample, and ``USUAL`` drawn from all others,
each of which stands for as many rows as were left out. Of the two inputs of an attention
product, ``PAIRS`` heads of single images, drawn at random, and of each some rows of the first
factor. Memory does not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.calibration.finite import check_finite
from ptq_onnx.calibration.statistics import copies_in, open_taps
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.runtime.packed import given

Array = NDArray[np.float32]
Double = NDArray[np.float64]

EXTREME, USUAL = 64, 192
"""Rows of a linear's input that are kept."""
PAIRS, ROWS = 24, 64
"""Heads of single images that are kept of an attention product, and rows of each."""


class RowSample:
    """Rows [R, K] of a stream of rows, and how many rows each stands for, [R]."""

    def __init__(self, channels: int, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._rows = np.zeros((0, channels), np.float32)
        self._size = np.zeros(0, np.float32)
        self._key = np.zeros(0)
        self.seen = 0

    def add(self, rows: Array, factor: Array | None = None) -> None:
        """Fold in rows [n, K]; a row's size is its largest magnitude over ``factor`` [K]."""
        self.seen += len(rows)
        size = np.abs(rows if factor is None else rows / factor).max(axis=1, initial=0)
        self._rows = np.concatenate([self._rows, rows])
        self._size = np.concatenate([self._size, size])
        self._key = np.concatenate([self._key, self._random.random(len(rows))])
        order = np.argsort(-self._size, kind="stable")
        others = order[EXTREME:]
        others = others[np.argsort(self._key[others], kind="stable")[:USUAL]]
        kept = np.concatenate([order[:EXTREME], others])
        self._rows, self._size, self._key = (a[kept] for a in (self._rows, self._size, self._key))

    @property
    def rows(self) -> Array:
        """The rows kept, the extreme ones first."""
        return self._rows

    @property
    def weight(self) -> Double:
        """How many rows of the stream each row stands for."""
        usual = len(self._rows) - min(EXTREME, len(self._rows))
        weight = np.ones(len(self._rows))
        weight[EXTREME:] = (self.seen - EXTREME) / max(usual, 1)
        return weight


class PairSample:
    """Pairs [U, R, K] and [U, K, N] of a stream of factors of attention products.

    What is drawn depends on the place of an image in the stream, not on how it is cut in batches.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed, self._seen = seed, 0
        self._kept: list[tuple[float, Array, Array, tuple[int, ...]]] = []
        self.lead: tuple[int, ...] = ()

    def add(self, first: Array, second: Array) -> None:
        """Fold in products first [..., T, K] @ second [..., K, N], leading axes broadcast."""
        lead = self.lead = np.broadcast_shapes(first.shape[:-2], second.shape[:-2])
        first = np.broadcast_to(first, (*lead, *first.shape[-2:]))
        second = np.broadcast_to(second, (*lead, *second.shape[-2:]))
        rows = first.shape[-2]
        for leading in range(lead[0] if lead else 1):
            random = np.random.default_rng((self._seed, self._seen))
            self._seen += 1
            last = self._kept[-1][0] if len(self._kept) >= PAIRS else 1.0
            for behind, key in np.ndenumerate(random.random(lead[1:])):
                if key >= last:
                    continue
                place = (leading, *behind) if lead else ()
                picked = random.permutation(rows)[: min(ROWS, rows)]
                pair = first[place][picked], second[place].copy()
                self._kept.append((float(key), *pair, place))
            self._kept = sorted(self._kept, key=lambda pair: pair[0])[:PAIRS]

    @property
    def factors(self) -> tuple[Array, Array]:
        """First and second factors, one product per pair."""
        return np.stack([p[1] for p in self._kept]), np.stack([p[2] for p in self._kept])

    @property
    def places(self) -> list[tuple[int, ...]]:
        """Where each pair stood in the leading axes ``lead`` of its batch."""
        return [p[3] for p in self._kept]


@dataclass(frozen=True)
class Wanted:
    """What to sample: tensors as rows, by name how rows [n, K] are made of one and its factor
    [K]; and pairs of tensors, by the name of their product."""

    rows: Mapping[str, tuple[Callable[[Array], Array], Array | None]]
    pairs: Mapping[str, tuple[str, str]]


def collect_samples(
    model: ir.Model,
    wanted: Wanted,
    batches: Iterable[Array],
    *,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, RowSample], dict[str, PairSample]]:
    """Run all batches [B, C, H, W] once: row samples by tensor, pair samples by product.

    Raises ModelError where a tensor is NaN or infinite (it names it).
    """
    tensors = dict.fromkeys([*wanted.rows, *(t for pair in wanted.pairs.values() for t in pair)])
    copy = graphs.to_standard(model)
    session, feed, names = open_taps(copy, tensors, threads)
    rows: dict[str, RowSample] = {}
    pairs = {name: PairSample() for name in wanted.pairs}
    copies = copies_in(batches)
    for batch in batches:
        found = dict(zip(names, session.run(names, {feed: batch}), strict=True)) if names else {}
        found |= given(session, batch)
        check_finite(found, tensors)
        for tensor, (as_rows, factor) in wanted.rows.items():
            array = as_rows(found[tensor])
            array = array[: len(array) // copies]
            rows.setdefault(tensor, RowSample(array.shape[1])).add(array, factor)
        for name, (first, second) in wanted.pairs.items():
            one, other = found[first], found[second]
            pairs[name].add(one[: len(one) // copies], other[: len(other) // copies])
        if progress is not None:
            progress(len(batch) // copies)
    return rows, pairs
