"""Weights of few bits in blocks of rows, whose steps are whole multiples of their column's.

A linear's rows are ordered by their size, and ``ROWS`` of them share a factor f and a zero point z
in each column:

    ŵ = s_n · f_bn · (q − z_bn),     |f (q − z)| ≤ 127, f from 1 to ``MOST``

So the product of f and q − z is a code of 8 bits, and the kernel is that of 8-bit weights, while
the file holds q, f and z of 4 bits each: 4.25 for each weight. Rows of like size lie together,
so that a channel's factor (``equalization/``), which makes its row large or small, costs little.

Sources: two levels of steps, the inner ones whole, from QServe (Lin et al., arXiv 2405.04532);
rows in an order of their own as in GPTQ's act-order groups (Frantar et al., arXiv 2210.17323),
here by the size of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ptq_onnx.config.bits import HALF
from ptq_onnx.numerics.blockwise import block_errors, block_grid, in_blocks
from ptq_onnx.numerics.codes.multiples import LARGEST, NARROW
from ptq_onnx.numerics.rounding import Codes, best_of
from ptq_onnx.numerics.two_sided import two_sided

Array = NDArray[np.float32]
Double = NDArray[np.float64]
Whole = NDArray[np.int32]

ROWS = 32
"""Rows of a block; the last may have fewer."""
MOST = 15
"""The largest factor: it is held in 4 bits."""
WIDEST = HALF
"""The most bits that are held so: above them a factor has no room in 8."""
NAMES = 1100
"""Bytes of the nodes and names that make a weight of its blocks."""
PARTS = np.linspace(1.0, 0.7, 4)
"""Of a column's steps, tried with the codes that they get."""


@dataclass(frozen=True, eq=False)
class Multiples:
    """Codes of 8 bits [K, N] of a weight, the step of each column [N], and the order of rows [K]
    in which blocks lie."""

    codes: Codes
    step: Array
    order: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Blocks:
    """What a file holds of such codes: factors and zero points [B, N], and ``codes`` [B · ROWS, N]
    from 0 to 2^bits − 1, in the order of blocks; beyond the last row they stand for 0."""

    codes: Whole
    factor: Whole
    zero: Whole

    @property
    def values(self) -> Whole:
        """f (q − z), [B · ROWS, N]."""
        factor, zero = (np.repeat(v, ROWS, axis=0) for v in (self.factor, self.zero))
        return np.asarray(factor * (self.codes - zero), np.int32)


def rounded_in_blocks(
    weight: Array, moments: Double, bits: int, largest: int = LARGEST
) -> Multiples:
    """A weight [K, N] for inputs of second moments [K, K]: factors and zero points by the error
    of single rows, codes by GPTQ, then one by one (``descended``); no code of 8 bits is above
    ``largest``."""
    power = np.square(weight, dtype=np.float64).sum(axis=1)
    order = np.asarray(np.argsort(-power, kind="stable"), np.int64)
    ordered, seen = weight[order], moments[np.ix_(order, order)]
    step, factor, zero = whole_grid(ordered, bits, np.diag(seen).copy(), largest)
    rows, columns = weight.shape
    factors, zeros = (np.repeat(v, ROWS, axis=0)[:rows] for v in (factor, zero))
    steps = (PARTS[:, None] * step).astype(np.float32)  # [P, N]
    tried = (factors * steps[:, None]).astype(np.float32)
    best, found = best_of(ordered, tried, seen, bits, zeros)
    whole = np.empty(weight.shape, np.int8)
    whole[order] = found * factors
    return Multiples(whole, steps[best, np.arange(columns)], order)


def improved_in_blocks(
    weight: Array, found: Multiples, moments: Double, costs: Double, bits: int
) -> Multiples:
    """The same steps, factors and zero points with codes by what errors cost the model's output
    (``numerics/two_sided.py``); ``costs`` [N, N]."""
    parts = steps_of(found.codes, found.order, bits)
    if parts is None:
        return found
    factor, *ends = parts
    small = (found.codes // factor).astype(np.int8)
    scale = np.asarray(factor * found.step, np.float64)
    codes = two_sided(weight, scale, moments, costs, small, (ends[0], ends[1]))
    return replace(found, codes=np.asarray(codes * factor, np.int8))


def whole_grid(
    weight: Array, bits: int, power: Double, largest: int = LARGEST
) -> tuple[Double, Whole, Whole]:
    """The step of each column [N], factors and zero points [B, N], for rows in their order.

    Blocks get the steps that they would have by themselves (``block_grid``), rounded down or up
    to whole multiples, whichever loses less; zero points are searched anew, those next to them too.
    """
    scale, zero = block_grid(weight, bits, power, ROWS)
    top = (1 << bits) - 1
    own = scale.astype(np.float64)
    step = (own * np.maximum(np.maximum(zero, top - zero) / largest, 1 / MOST)).max(axis=0)
    blocks, shares = in_blocks(weight, power, ROWS)
    least = np.full(own.shape, np.inf)
    factor, point = np.ones(own.shape, np.int32), np.full(own.shape, (top + 1) // 2, np.int32)
    for whole in (np.floor(own / step), np.ceil(own / step)):
        multiple = np.clip(whole, 1, MOST)
        real = multiple * step
        middle = np.rint(top / 2 - (top / 2 - zero) * own / real)
        for near in (-1, 0, 1):
            z = np.clip(middle + near, 0, top)
            fits = np.maximum(z, top - z) * multiple <= largest
            errors = block_errors(blocks, shares, real, z, bits)
            better = fits & (errors < least)
            least = np.where(better, errors, least)
            factor = np.where(better, multiple, factor).astype(np.int32)
            point = np.where(better, z, point).astype(np.int32)
    return step, factor, point


def blocks_of(codes: NDArray[np.int8], order: NDArray[np.int64], bits: int) -> Blocks | None:
    """The factors, zero points and codes that make given 8-bit codes [K, N], each factor the
    least that does; None where the codes of a block are no few multiples of one number."""
    top = (1 << bits) - 1
    rows, columns = codes.shape
    padded = np.zeros((rows + -rows % ROWS, columns), np.int32)
    padded[:rows] = codes[order]
    blocks = padded.reshape(-1, ROWS, columns)
    low, high = np.minimum(blocks.min(axis=1), 0), np.maximum(blocks.max(axis=1), 0)
    divisor = np.gcd.reduce(blocks, axis=1)
    factor = np.zeros(divisor.shape, np.int32)
    for tried in range(MOST, 0, -1):
        makes = (divisor % tried == 0) & (high - low <= top * tried)
        factor = np.where(makes, tried, factor)
    if not factor.all():
        return None
    zero = -low // factor
    small = blocks // factor[:, None] + zero[:, None]
    return Blocks(small.reshape(padded.shape), factor, zero)


def beside_codes(shape: Sequence[int | str]) -> int:
    """Bytes that a file has for a weight [K, N] in blocks, beside its codes."""
    rows, columns = map(int, shape)
    blocks = -(-rows // ROWS)
    return blocks * columns + (blocks * ROWS - rows) * columns // 2 + 2 * rows + NAMES


def steps_of(
    codes: NDArray[np.int8], order: NDArray[np.int64], bits: int
) -> tuple[Whole, Whole, Whole] | None:
    """For each weight [K, N] its factor, and the smallest and the largest q - z that it may have
    beside the others of its block; products stay within 8 bits, or 7 where all are. None as
    :func:`blocks_of`."""
    found = blocks_of(codes, order, bits)
    if found is None:
        return None
    largest = NARROW if np.abs(codes, dtype=np.int32).max(initial=0) <= NARROW else LARGEST
    room = largest // found.factor
    low = np.maximum(-found.zero, -room)
    high = np.minimum((1 << bits) - 1 - found.zero, room)
    places = np.argsort(order)
    factor, low, high = (np.repeat(v, ROWS, axis=0)[places] for v in (found.factor, low, high))
    return factor, low, high
