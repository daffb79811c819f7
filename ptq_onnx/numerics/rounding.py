"""Rounding of a linear's weight by what it does to the output, not to the weight.

All functions take ``weight`` [K, N], ``scale`` [N] or [K, N] and ``moments`` H = E[xᵀx] [K, K]
of the rows x [K] that the linear reads, and return int8 codes [K, N]. The scales stay as they are.
Codes have a sign, or count from ``zero`` [N] or [K, N] where one is given.
With Δ = scale·codes - weight, the output's mean squared error is ΔᵀHΔ per column; columns do
not depend on each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptq_onnx.numerics.codes.code import TINY

Array = NDArray[np.float32]
Double = NDArray[np.float64]
Codes = NDArray[np.int8]
Zero = NDArray[np.int32] | None

DAMPING = 0.01
"""Of H's mean diagonal, added to the diagonal: keeps the inverse finite."""
BLOCK = 128
"""Input channels whose errors are passed on at once to those behind them."""
RANGES = np.linspace(1.0, 0.4, 10)
"""Parts of a column's range that its codes may cover."""
PASSES = 4
"""Over all input channels, at most."""
ITERATIONS = 400
RATE, STRENGTH, WARM = 0.03, 0.5, 0.2
"""Of AdaRound: Adam's step, the regulariser's weight, and the part of the run without it."""
HOT, COLD = 20.0, 2.0
"""Exponent of the regulariser at first and in the end."""
GAMMA, ZETA = -0.1, 1.1
"""Ends of the stretched sigmoid."""


def limits(bits: int, zero: Zero = None) -> tuple[Any, Any]:
    """Smallest and largest signed code; or of those without a sign, less their zero point."""
    if zero is not None:
        return -zero, (1 << bits) - 1 - zero
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def nearest(weight: Array, scale: Array, bits: int, zero: Zero = None) -> Codes:
    """clip(round(w / s)): the least error of each weight by itself."""
    return np.asarray(np.clip(np.rint(weight / scale), *limits(bits, zero)), np.int8)


def loss(weight: Array, scale: Array, moments: Double, codes: Codes) -> Double:
    """ΔᵀHΔ per column, [N]: the mean squared error of the outputs."""
    delta = codes * scale.astype(np.float64) - weight
    return np.asarray(np.einsum("kn,kn->n", delta, moments @ delta), np.float64)


def shrunk(moments: Double, rows: int) -> Double:
    """(1 - ρ) H + ρ diag(H), ρ = K / (K + rows).

    Moments of few rows show directions without any input that other images do fill; without
    this the errors would all be put there.
    """
    part = len(moments) / (len(moments) + max(rows, 1))
    result = (1 - part) * moments
    np.fill_diagonal(result, np.diag(moments))
    return result


def gptq(weight: Array, scale: Array, moments: Double, bits: int, zero: Zero = None) -> Codes:
    """Rounds one input channel after the other; the channels not rounded yet make up for it.

    Channel i's error, times U[i, j] / U[i, i], is taken from channel j, where UᵀU = H⁻¹.
    Channels of large power come first. Source: Frantar et al., "GPTQ" (arXiv 2210.17323).
    """
    factor, order = _inverse_factor(moments)
    left = weight.astype(np.float64)[order]
    steps = np.broadcast_to(scale.astype(np.float64), left.shape)[order]
    lowest, highest = (np.broadcast_to(edge, left.shape)[order] for edge in limits(bits, zero))
    codes = np.empty(left.shape, np.int8)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = np.empty((stop - start, left.shape[1]))
        for i in range(start, stop):
            rounded = np.clip(np.rint(left[i] / steps[i]), lowest[i], highest[i])
            codes[order[i]] = rounded
            error = (left[i] - rounded * steps[i]) / factor[i, i]
            left[i + 1 : stop] -= factor[i, i + 1 : stop, None] * error
            errors[i - start] = error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return _better(weight, scale, moments, codes, nearest(weight, scale, bits, zero))


def gptq_ranged(
    weight: Array, moments: Double, bits: int
) -> tuple[Array, NDArray[np.int32], Codes]:
    """Scale and zero point per column, [N] each, and codes less their zero point.

    Of ``RANGES`` of the way from a column's least to its largest weight whichever leaves it the
    smallest loss once its codes are found; the codes then improved one by one (``descended``).
    """
    width, top = weight.shape[1], (1 << bits) - 1
    low, high = weight.min(axis=0, initial=0), weight.max(axis=0, initial=0)
    full = np.maximum((high.astype(np.float64) - low) / top, TINY)
    zero = np.clip(np.rint(-low / full), 0, top).astype(np.int32)
    tried = np.maximum(RANGES[:, None] * full, TINY).astype(np.float32)  # [R, N]
    best, codes = best_of(weight, tried, moments, bits, zero)
    return tried[best, np.arange(width)], zero, codes


def best_of(
    weight: Array, tried: Array, moments: Double, bits: int, zero: NDArray[np.int32]
) -> tuple[NDArray[np.int64], Codes]:
    """Which of several scales [R, N] or [R, K, N] leaves each column the smallest loss once its
    codes are found, [N]; and these codes, improved one by one (``descended``)."""
    width = weight.shape[1]
    many, scales, zeros = (
        np.concatenate(parts, axis=-1)
        for parts in ([weight] * len(tried), list(tried), [zero] * len(tried))
    )
    codes = gptq(many, scales, moments, bits, zeros)
    best = loss(many, scales, moments, codes).reshape(len(tried), width).argmin(axis=0)
    chosen = best * width + np.arange(width)
    start = codes[:, chosen]
    return best, descended(weight, scales[..., chosen], moments, bits, start, zero)


def descended(
    weight: Array, scale: Array, moments: Double, bits: int, codes: Codes, zero: Zero = None
) -> Codes:
    """Codes of which none can be changed alone, one input channel after the other, for a smaller
    loss: c_i ← clip(round(c_i - (HΔ)_i / (H_ii s))), until nothing changes or ``PASSES`` are over.
    """
    smallest, largest = (np.broadcast_to(edge, weight.shape) for edge in limits(bits, zero))
    power = np.diag(moments)
    steps = np.broadcast_to(scale.astype(np.float64), weight.shape)
    found = codes.astype(np.float64)
    slope = moments @ (found * steps - weight)
    read = [i for i in np.argsort(-power, kind="stable") if power[i] > 1e-12 * power.max()]
    for _ in range(PASSES):
        changed = False
        for i in read:
            wanted = found[i] - slope[i] / (power[i] * steps[i])
            change = np.clip(np.rint(wanted), smallest[i], largest[i]) - found[i]
            columns = np.flatnonzero(change)
            if len(columns):
                slope[:, columns] += moments[:, i, None] * (change * steps[i])[columns]
                found[i] += change
                changed = True
        if not changed:
            break
    return _better(weight, scale, moments, found.astype(np.int8), codes)


def adaround(
    weight: Array,
    scale: Array,
    moments: Double,
    bits: int,
    zero: Zero = None,
    iterations: int = ITERATIONS,
) -> Codes:
    """Learns for each weight whether it is rounded up or down.

    Minimises ΔᵀHΔ + λ Σ (1 - |2h - 1|^β) by Adam, h = clip(σ(v) (ζ - γ) + γ, 0, 1) being the
    part by which a weight is above its lower code, and β falling from ``HOT`` to ``COLD``.
    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv
    2004.10568), with the loss from second moments instead of images.
    """
    lowest, highest = limits(bits, zero)
    exact = weight.astype(np.float64) / scale
    lower = np.clip(np.floor(exact), lowest, highest - 1)
    power = float(np.trace(moments)) / max(len(moments), 1)
    gram = torch.from_numpy(np.asarray(moments / (power or 1.0), np.float32))
    offset = torch.from_numpy(np.asarray(lower - exact, np.float32))
    # Steps over their column's mean: one where a column has one step.
    steps = np.broadcast_to(scale, weight.shape)
    unit = torch.from_numpy(np.asarray(steps / steps.mean(axis=0), np.float32))
    part = np.clip(exact - lower, 0.0, 1.0)
    inner = np.clip((part - GAMMA) / (ZETA - GAMMA), 1e-3, 1 - 1e-3)
    start = torch.from_numpy(np.asarray(np.log(inner / (1 - inner)), np.float32))
    v = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([v], lr=RATE)
    for step in range(iterations):
        sigmoid = torch.sigmoid(v.detach())
        stretched = sigmoid * (ZETA - GAMMA) + GAMMA
        h = stretched.clamp(0, 1)
        slope = 2 * unit * (gram @ (unit * (offset + h)))  # of ΔᵀHΔ by h, in units of the steps
        done = (step / max(iterations, 1) - WARM) / (1 - WARM)
        if done > 0:
            beta = COLD + (HOT - COLD) * (1 + np.cos(np.pi * done)) / 2
            away = 2 * h - 1
            slope -= STRENGTH * 2 * beta * away.sign() * away.abs() ** (beta - 1)
        v.grad = slope * sigmoid * (1 - sigmoid) * (ZETA - GAMMA)
        adam.step()
    up = (torch.sigmoid(v.detach()) >= 0.5).numpy()
    codes = np.asarray(lower + up, np.int8)
    return _better(weight, scale, moments, codes, nearest(weight, scale, bits, zero))


def _better(weight: Array, scale: Array, moments: Double, one: Codes, other: Codes) -> Codes:
    """Per column the codes with the smaller loss."""
    kept = loss(weight, scale, moments, one) < loss(weight, scale, moments, other)
    return np.where(kept, one, other)


def _inverse_factor(moments: Double) -> tuple[Double, NDArray[np.int64]]:
    """Upper U with UᵀU = H⁻¹, of the damped H in descending order of its diagonal; the order.

    A channel without input gets a diagonal of its own, and passes nothing on. Damping grows
    where rounding has left H without an inverse.
    """
    power = np.diag(moments)
    order = np.asarray(np.argsort(-power, kind="stable"), np.int64)
    mean = float(power.mean()) or 1.0
    damping = DAMPING
    while True:
        damped = moments[np.ix_(order, order)]
        damped[np.diag_indices_from(damped)] += damping * mean
        try:
            # With rows and columns turned round, LLᵀ = H is UUᵀ; its inverse is lower there.
            turned = np.linalg.cholesky(damped[::-1, ::-1])
            inverse = np.linalg.inv(turned)
            return np.triu(inverse[::-1, ::-1]), order
        except np.linalg.LinAlgError:
            damping *= 10
