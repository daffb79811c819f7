"""Chooses the matrix that turns each residual stream, from one run of the calibration images.

Of every tensor that norms read, and of what each makes without γ and β, the rows with the largest
values and some of all others are kept (``calibration/product_samples.py``). A candidate is judged
by the error that one scale for the whole tensor leaves in them, its range searched too: of a
tensor of the stream as parts of each row's own variance, which the norm behind it divides by.
So massive tokens, which few rows are, may be clipped where all others gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.calibration.product_samples import RowSample
from ptq_onnx.equalization.learned_turns import NOTHING, Learned
from ptq_onnx.equalization.rotation import turn
from ptq_onnx.equalization.stream_parts import Stream
from ptq_onnx.equalization.stream_rows import Rows, collect_rows, read_by_norms, sensitivities
from ptq_onnx.equalization.stream_trial import (
    Outputs,
    Steps,
    StreamTrial,
    outputs_of,
    refined,
    some_of,
)
from ptq_onnx.equalization.streams import Refused, find_streams
from ptq_onnx.numerics.ptf import Factors, searched_factors
from ptq_onnx.numerics.rotations import flattened, spreading

Double = NDArray[np.float64]

SEEDS = 16
"""Spreading matrices that are tried."""
CLIPS = np.linspace(1.0, 0.3, 15)
"""Parts of the range seen that are tried."""
WORTH_PRODUCTS = 0.8
"""Part of the expected error that may be left where products are added."""
How = Literal["none", "spread", "spread, then flattened", "learned", "none: factors per channel"]
"""How a matrix is made, or what holds a stream that has none."""
PLAIN: Final = "none"
SPREAD: Final = "spread"
FLATTENED: Final = "spread, then flattened"
LEARNED: Final = "learned"
FACTORS: Final = "none: factors per channel"


@dataclass(frozen=True)
class Turned:
    """One stream, and what was done to it."""

    stream: str
    """Its first norm."""
    width: int
    tensors: int
    """How many of its tensors norms read."""
    by: How
    seed: int
    largest_before: float
    largest_after: float
    stream_db: float
    """Expected noise of one scale for each of its tensors, against that before (more: better); of
    factors per channel, what the outputs lose less than by the best matrix."""
    norm_db: float
    """The same of what its norms make."""
    products: int = 0
    """Products that were added, for what does not take the matrix in."""
    added: float = 0.0
    """Multiplications of these, as a part of those of the stream's own."""
    refined_db: float = 0.0
    """What the outputs lose less since the steps were chosen by that."""
    direction: tuple[float, ...] = field(default=(), repr=False)
    """[D], what was flattened; empty where nothing was."""
    loss_db: float = 0.0
    """What a learned matrix saves of the expected loss on images held apart."""

    @property
    def matrix(self) -> Double | None:
        """R [D, D]; None where the stream stays, and of a learned one, which no seed gives."""
        if self.by in (PLAIN, FACTORS, LEARNED):
            return None
        spread = spreading(self.width, self.seed)
        return spread if self.by == SPREAD else flattened(spread, np.array(self.direction))


@dataclass(frozen=True)
class Turns:
    """What :func:`turn_streams` did: found, refused, and ranges for tensors of streams."""

    turned: tuple[Turned, ...]
    refused: tuple[Refused, ...]
    ranges: Mapping[str, tuple[float, float]]
    matrices: tuple[Double | None, ...]
    """Of every stream in graph order; None where it stays."""
    added: tuple[str, ...] = ()
    """The linears that were added."""
    factors: Mapping[str, Factors] = field(default_factory=dict)
    """Powers of two per channel, for tensors of streams that stay."""

    @property
    def changed(self) -> bool:
        """Whether any stream was turned."""
        return any(matrix is not None for matrix in self.matrices)

    def to_json(self) -> dict[str, Any]:
        """What ``report.json`` says."""
        return {
            "turned": [asdict(one) for one in self.turned],
            "refused": [asdict(one) for one in self.refused],
        }


@dataclass(frozen=True)
class Codes:
    """What the tensors of a stream, and what norms make of it, are going to be held in."""

    levels: int
    symmetric: bool
    """Zero is in the middle of the codes."""
    of_stream: bool = True
    """Tensors of the stream are quantized; else what norms make alone is."""
    factors: bool = False
    """They may have powers of two per channel."""
    max_k: int | None = None
    """The largest exponent of these."""
    levels_of: Mapping[str, int] = field(default_factory=dict)
    """Of tensors of streams that have another number of codes."""

    def levels_in(self, tensor: str) -> int:
        """How many codes a tensor of a stream has."""
        return self.levels_of.get(tensor, self.levels)


def turn_streams(
    model: ir.Model,
    batches: Iterable[Any],
    codes: Codes,
    *,
    learned: Learned = NOTHING,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Turns:
    """Turn every stream of the model, in place, where it lowers the expected error of one scale per
    tensor, or as it was ``learned``. ``batches`` [B, C, H, W] are run once, a few of them again for
    factors."""
    streams, refused = find_streams(model.graph)
    if not streams:
        return Turns((), tuple(refused), {}, ())
    rows = collect_rows(model, streams, batches, threads, progress)
    turned: list[Turned] = []
    ranges: dict[str, tuple[float, float]] = {}
    matrices: list[Double | None] = []
    added: list[str] = []
    factors: dict[str, Factors] = {}
    trial = _Trial(model.clone(), batches, codes, threads, learned)
    for number, stream in enumerate(streams):
        found, best = _choose(number, stream, rows, trial)
        turned.append(found)
        matrices.append(best.matrix)
        factors.update(best.factors)
        if best.matrix is not None:
            before = read_by_norms(stream)
            added += turn(model.graph, stream, best.matrix)
            now = dict(zip(before, read_by_norms(stream), strict=True))
            ranges.update({now[name]: ends for name, ends in best.ranges.items()})
    return Turns(tuple(turned), tuple(refused), ranges, tuple(matrices), tuple(added), factors)


def turn_as(model: ir.Model, turned: Sequence[Turned]) -> Turns | None:
    """Turn the streams of the model, in place, as an earlier run did; None, and nothing turned,
    where its numbers are not of these streams."""
    streams, refused = find_streams(model.graph)
    if [(t.stream, t.width) for t in turned] != [(str(s.norms[0].name), s.width) for s in streams]:
        return None
    for one in turned:
        whole = one.by != FLATTENED or len(one.direction) == one.width
        if one.by == LEARNED or not whole or one.seed < 0 or not np.isfinite(one.direction).all():
            return None
    matrices = tuple(one.matrix for one in turned)
    added: list[str] = []
    for stream, matrix in zip(streams, matrices, strict=True):
        if matrix is not None:
            added += turn(model.graph, stream, matrix)
    return Turns(tuple(turned), tuple(refused), {}, matrices, tuple(added))


def turn_again(model: ir.Model, matrices: Iterable[Double | None]) -> None:
    """Turn the streams of the same model, prepared anew, by the matrices found before."""
    for stream, matrix in zip(find_streams(model.graph)[0], matrices, strict=True):
        if matrix is not None:
            turn(model.graph, stream, matrix)


@dataclass(frozen=True)
class _Tried:
    """A candidate, the expected errors of the stream's tensors and of what norms make, [T] each,
    and the ranges of the stream's tensors."""

    how: How
    seed: int
    matrix: Double | None
    stream: Double
    normed: Double
    ranges: dict[str, tuple[float, float]]
    largest: float
    factors: Mapping[str, Factors] = field(default_factory=dict)
    won: float | None = None
    """dB that factors save of what the outputs lose, where they are chosen by that."""
    refined: float = 0.0

    @property
    def score(self) -> float:
        """Expected noise of the stream and of what norms make of it, over all channels."""
        return float(self.stream.sum() + self.normed.sum())


def _choose(
    number: int, stream: Stream, samples: Mapping[str, RowSample], trial: _Trial
) -> tuple[Turned, _Tried]:
    """The candidate with the least expected error: the stream as it is where none is better."""
    codes = trial.codes
    rows = [Rows.of(name, samples[name]) for name in dict.fromkeys(read_by_norms(stream))]

    def tried(how: How, seed: int, matrix: Double | None) -> _Tried:
        turned = [one.turned(matrix) for one in rows]
        outer = [
            _searched(r.stream, r.power, codes.levels_in(r.tensor), codes.symmetric) for r in turned
        ]
        inner = [_searched(r.normed, r.counts, codes.levels, codes.symmetric) for r in turned]
        return _Tried(
            how,
            seed,
            matrix,
            np.array([error for error, _, _ in outer]) * codes.of_stream,
            np.array([error for error, _, _ in inner]),
            {r.tensor: (low, high) for r, (_, low, high) in zip(turned, outer, strict=True)},
            max(float(np.abs(r.stream).max()) for r in turned),
        )

    direction = _massive(rows)
    best = plain = tried(PLAIN, 0, None)
    own = trial.learned.matrices.get(number)
    if own is not None:
        best = tried(LEARNED, 0, own)
    for seed in range(SEEDS if own is None else 0):
        spread = spreading(stream.width, seed)
        found = tried(SPREAD, seed, spread), tried(FLATTENED, seed, flattened(spread, direction))
        best = min(best, *found, key=lambda one: one.score)
    if stream.products and best.score > WORTH_PRODUCTS * plain.score:
        best = plain
    if trial.codes.of_stream:
        best = trial.best(number, rows, plain, best)
    turned = Turned(
        stream=str(stream.norms[0].name),
        width=stream.width,
        tensors=len(rows),
        by=best.how,
        seed=best.seed,
        largest_before=plain.largest,
        largest_after=best.largest,
        stream_db=_decibels(plain.stream, best.stream) if best.won is None else best.won,
        norm_db=_decibels(plain.normed, best.normed),
        products=0 if best.matrix is None else len(stream.products),
        added=0.0 if best.matrix is None else stream.added,
        refined_db=best.refined,
        direction=tuple(direction.tolist()) if best.how == FLATTENED else (),
        loss_db=trial.learned.saved.get(number, 0.0),
    )
    return turned, best


@dataclass(frozen=True)
class _Held:
    """A stream as it is held in a trial: steps by the tensors' names there."""

    tried: _Tried
    trial: StreamTrial
    steps: Mapping[str, Steps]
    now: Mapping[str, str]
    """The name in the trial of each tensor of the stream."""

    def refined(self, lost: list[float] | None = None, won: float | None = None) -> _Tried:
        """The ranges or factors times what :func:`refined` finds; ``lost``: by the outputs before,
        where that is known."""
        better = refined(self.trial, self.steps, lost)
        by = {name: better.factors[held] for name, held in self.now.items()}
        gain = _decibels(better.before, better.after)
        one = self.tried
        ranges = {n: (low * by[n], high * by[n]) for n, (low, high) in one.ranges.items()}
        factors = {n: replace(f, scale=f.scale * by[n]) for n, f in one.factors.items()}
        return replace(one, ranges=ranges, factors=factors, won=won, refined=gain)


@dataclass
class _Trial:
    """Factors per channel against matrices, by what the outputs lose on a few images."""

    model: ir.Model
    """The model before any stream was turned."""
    batches: Iterable[Any]
    codes: Codes
    threads: int
    learned: Learned = NOTHING
    original: Outputs = field(default_factory=list)

    def best(self, number: int, rows: list[Rows], plain: _Tried, best: _Tried) -> _Tried:
        """Stream ``number`` turned by ``best``, or as it is with factors where it may have these
        and the outputs lose less; its steps refined. One that stays without factors is calibrated
        as any tensor is."""
        if best.matrix is None and not self.codes.factors:
            return best
        if not self.original:
            self.batches = some_of(self.batches)
            self.original = outputs_of(self.model, self.batches, self.threads)
        turned = self.by_range(number, best)
        if not self.codes.factors:
            return turned.refined()
        held = self.by_factors(number, rows, plain)
        lost = held.trial.lost(held.steps), turned.trial.lost(turned.steps)
        if lost[0][-1] > lost[1][-1]:
            return best if best.matrix is None else turned.refined(lost[1])
        return held.refined(lost[0], _decibels(lost[1][-1], lost[0][-1]))

    def by_factors(self, number: int, rows: list[Rows], plain: _Tried) -> _Held:
        """The stream as it is, with searched factors per channel."""
        codes = self.codes
        counts = sensitivities(find_streams(self.model.graph)[0][number])
        factors: dict[str, Factors] = {}
        for one in rows:
            limits = (0, codes.levels_in(one.tensor) - 1)
            factors[one.tensor], _ = searched_factors(
                one.stream, one.power, limits, codes.max_k, counts[one.tensor]
            )
        steps = {n: Steps.of_factors(found, codes.levels_in(n)) for n, found in factors.items()}
        tried = replace(plain, how=FACTORS, factors=factors)
        return self.held(tried, self.model, steps, {name: name for name in steps})

    def by_range(self, number: int, best: _Tried) -> _Held:
        """The turned stream, with one step for each tensor."""
        turned = self.model.clone()
        stream = find_streams(turned.graph)[0][number]
        names = read_by_norms(stream)
        if best.matrix is not None:
            turn(turned.graph, stream, best.matrix)
        now = dict(zip(names, read_by_norms(stream), strict=True))
        steps = {
            now[name]: Steps.of_range(*ends, self.codes.levels_in(name))
            for name, ends in best.ranges.items()
        }
        return self.held(best, turned, steps, now)

    def held(
        self, tried: _Tried, model: ir.Model, steps: Mapping[str, Steps], now: Mapping[str, str]
    ) -> _Held:
        """That, with a trial of it."""
        trial = StreamTrial(model, steps, self.batches, self.threads, self.original)
        return _Held(tried, trial, steps, now)


def _massive(rows: list[Rows]) -> Double:
    """The direction [D] with the most energy, of the tensor with the most, without the mean."""
    most = max(rows, key=lambda one: float(one.counts @ (one.stream**2).sum(axis=1)))
    centred = most.stream - most.stream.mean(axis=1, keepdims=True)
    moment = (centred * most.counts[:, None]).T @ centred
    return np.asarray(np.linalg.eigh(moment)[1][:, -1], np.float64)


def _decibels(before: Double | float, after: Double | float) -> float:
    return float(10 * np.log10(max(np.sum(before), 1e-300) / max(np.sum(after), 1e-300)))


def _searched(
    rows: Double, power: Double, levels: int, symmetric: bool
) -> tuple[float, float, float]:
    """Least expected error Σ power · mean (x - x̂)² of one range for rows [R, D], and the range.

    Rounding is step² / 12 wherever a value is inside, clipping what is outside.
    """
    low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
    if symmetric:
        high = max(high, -low)
        low = -high
    total = float(power.sum())
    outer = np.abs(rows) > CLIPS[-1] * min(-low or high, high or -low)
    picked, share = rows[outer], np.broadcast_to(power[:, None], rows.shape)[outer] / rows.shape[1]
    best = (float("inf"), low, high)
    for clip in CLIPS:
        below, above = low * clip, high * clip
        beyond = picked - np.clip(picked, below, above)
        step = (above - below) / (levels - 1)
        error = total * step**2 / 12 + float(share @ beyond**2)
        if error < best[0]:
            best = (error, float(below), float(above))
    return best
