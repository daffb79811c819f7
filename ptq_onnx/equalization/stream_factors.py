"""Powers of two per channel on a stream as it is: the other way to hold massive channels.

A massive channel with a step of its own disturbs little where γ of the norms behind it is small,
which a matrix gives up: it spreads the rounding over all channels. So the two are compared by the
error in what the norms' readers make, Σ_c e_c m_c / Σ_c E[n_c²] m_c, with e_c the error of channel
c, n_c what the norm makes of it without γ and β, and m_c = γ_c² Σ_n W_cn² of all that read it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq_onnx.equalization.rotation import affine_of, channels_last
from ptq_onnx.equalization.stream_rows import Rows
from ptq_onnx.equalization.streams import Stream
from ptq_onnx.numerics.ptf import Factors, searched_factors

Double = NDArray[np.float64]


@dataclass(frozen=True)
class Readers:
    """What reads a tensor of a stream through a norm, per channel of the stream, [D] each."""

    scale: Double
    shift: Double
    power: Double
    """Σ_n W_cn² of all weights behind the norm."""

    @classmethod
    def of(cls, stream: Stream, norm: ir.Node) -> Readers:
        """Of one norm; ones where nothing behind it takes a weight. Pieces are taken together."""
        scale, shift = affine_of(norm)
        power = np.zeros(len(scale))
        for reader, before in stream.readers:
            if before is norm:
                rows = channels_last(reader).reshape(-1, len(scale))
                power += (rows**2).sum(axis=0)
        power = power if power.any() else np.ones(len(scale))
        scale, shift, power = (
            a.reshape(-1, stream.width).mean(axis=0) for a in (scale, shift, power)
        )
        return cls(scale, shift, power)


@dataclass(frozen=True)
class Held:
    """Factors of the stream's tensors, by name, and the error in what reads them."""

    factors: dict[str, Factors]
    error: float


def hold_by_factors(
    rows: Collection[Rows], readers: dict[str, Readers], levels: int, max_k: int | None
) -> Held:
    """Factors per channel for every tensor of a stream as it is, and for what its norms make."""
    limits = (0, levels - 1)
    factors: dict[str, Factors] = {}
    error = 0.0
    for one in rows:
        behind = readers[one.tensor]
        factors[one.tensor], noise = searched_factors(one.stream, one.power, limits, max_k)
        made = one.normed * behind.scale + behind.shift
        _, more = searched_factors(made, one.counts, limits, max_k)
        seen = noise @ (behind.scale**2 * behind.power) + more @ behind.power
        error += float(seen) / _signal(one, behind)
    return Held(factors, error)


def error_behind(
    rows: Collection[Rows], readers: dict[str, Readers], stream: Double, normed: Double
) -> float:
    """The same of errors that all channels share alike, [T] of the stream and behind norms."""
    shared = 0.0
    for one, outer, inner in zip(rows, stream, normed, strict=True):
        behind = readers[one.tensor]
        total = float(np.sum(behind.scale**2 * behind.power))
        shared += float(outer + inner) * total / _signal(one, behind)
    return shared


def _signal(rows: Rows, behind: Readers) -> float:
    energy = rows.counts @ rows.normed**2
    return max(float(energy @ (behind.scale**2 * behind.power)), 1e-30)
