"""Orthogonal matrices that keep the mean over channels, and spread what stands out.

x [.., D] becomes x R. Where R is orthogonal and R·1 = 1, a row keeps its mean and its variance, so
that LayerNormalization without γ and β commutes with R.

Source of Hadamard rotations in quantization: QuIP# (arXiv 2402.04396), QuaRot (arXiv 2404.00456),
for networks with RMSNorm. R·1 = 1 and the reflection of one direction are this project's.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

Double = NDArray[np.float64]

SMALLEST = 1e-12


def spreading(width: int, seed: int) -> Double:
    """An orthogonal matrix R [D, D] with R·1 = 1 that spreads every single channel evenly.

    B is a Hadamard matrix over √D whose first column is 1/√D, with random signs of the others,
    and Q the reflection that takes 1/√D to the first unit vector: R = B Q, so that
    R·1 = √D B e₁ = 1. Q differs from the identity by one column and by 1/√D elsewhere: but for
    one column, the entries of R stay at ± 1/√D within O(1/D). A conjugated H diag(± 1) Hᵀ / D,
    which keeps the mean too, has entries like Gaussian ones, up to three times as large. Widths
    without a Hadamard matrix take a random orthogonal one.
    """
    random = np.random.default_rng((width, seed))
    base = _even(width, random)
    ones = np.full(width, width**-0.5)
    rotation = base @ _reflection(ones, np.eye(1, width)[0])
    return np.asarray(rotation[:, random.permutation(width)], np.float64)


def even(width: int, seed: int = 0) -> Double:
    """An orthogonal matrix [D, D] that spreads every channel evenly; the mean is not kept."""
    return _even(width, np.random.default_rng((width, seed)))


def flattened(rotation: Double, direction: Double) -> Double:
    """``rotation`` R [D, D] followed by the reflection that makes ``direction`` u [D] flat.

    u, without its mean, comes out as u′ = u R; f = sign(u′) without its mean, of the length of
    u′, is as flat as a vector without a mean can be. The reflection that swaps u′ and f leaves
    1 alone, as neither has a mean.
    """
    turned = (direction - direction.mean()) @ rotation
    length = float(np.linalg.norm(turned))
    flat = np.where(turned < 0, -1.0, 1.0)
    flat -= flat.mean()
    if length < SMALLEST or not flat.any():
        return rotation
    return np.asarray(
        rotation @ _reflection(turned / length, flat / np.linalg.norm(flat)), np.float64
    )


def _reflection(one: Double, other: Double) -> Double:
    """The Householder reflection [D, D] that swaps two unit vectors [D]."""
    between = one - other
    size = float(between @ between)
    if size < SMALLEST:
        return np.eye(len(one))
    return np.asarray(np.eye(len(one)) - 2 / size * np.outer(between, between), np.float64)


def _even(width: int, random: np.random.Generator) -> Double:
    """An orthogonal matrix [D, D] whose first column is 1/√D, entries as alike as there are."""
    found = hadamard(width)
    if found is None:
        drawn = random.standard_normal((width, width))
        drawn[:, 0] = 1
        basis, upper = np.linalg.qr(drawn)
        return np.asarray(basis * np.sign(np.diag(upper)), np.float64)
    signs = np.where(random.random(width) < 0.5, -1.0, 1.0)
    signs[0] = 1
    return np.asarray(found * signs / np.sqrt(width), np.float64)


@functools.cache
def hadamard(width: int) -> Double | None:
    """A matrix [D, D] of ± 1 with orthogonal rows, its first column all ones; None where neither
    Sylvester's doubling nor Paley's constructions (1933) give one."""
    doubled, core = 0, _paley(width)
    while core is None and width % 2 == 0:
        width, doubled = width // 2, doubled + 1
        core = _paley(width)
    if core is None:
        return None
    found: Double = core
    for _ in range(doubled):
        found = np.asarray(np.kron(found, [[1.0, 1.0], [1.0, -1.0]]), np.float64)
    return np.asarray(found * found[:, :1], np.float64)


def _paley(width: int) -> Double | None:
    """A Hadamard matrix of order 1, 2, q + 1 (q prime, 3 modulo 4) or 2 q + 2 (1 modulo 4)."""
    if width in (1, 2):
        return np.array([[1.0, 1.0], [1.0, -1.0]])[:width, :width]
    if width % 4:
        return None
    if _is_prime(width - 1):
        core = np.zeros((width, width))
        core[0, 1:], core[1:, 0], core[1:, 1:] = 1, -1, _residues(width - 1)
        return np.asarray(core + np.eye(width))
    half = width // 2
    if (half - 1) % 4 == 1 and _is_prime(half - 1):
        core = np.zeros((half, half))
        core[0, 1:], core[1:, 0], core[1:, 1:] = 1, 1, _residues(half - 1)
        on, off = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        return np.asarray(np.kron(core, on) + np.kron(np.eye(half), off), np.float64)
    return None


def _residues(prime: int) -> Double:
    """Whether i - j is a square modulo a prime (1), none (-1) or zero (0), [q, q]."""
    symbol = np.full(prime, -1.0)
    symbol[np.arange(prime) ** 2 % prime] = 1
    symbol[0] = 0
    index = np.arange(prime)
    return np.asarray(symbol[(index[:, None] - index) % prime], np.float64)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))
