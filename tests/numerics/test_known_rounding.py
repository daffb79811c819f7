"""GPTQ, AdaRound and scales of weights against plain loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from ptq_onnx.numerics.ptf import Reader
from ptq_onnx.numerics.rounding import adaround, gptq, loss, nearest, shrunk
from ptq_onnx.numerics.weights import weight_scale

Array = NDArray[np.float64]


def moments_of(channels: int, seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    x = random.normal(size=(500, 5)) @ random.normal(size=(5, channels))
    x = x + random.normal(size=(500, channels)) * random.uniform(0.2, 1.5, channels)
    return np.asarray(x.T @ x / 500)


def layer(
    channels: int, columns: int, bits: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    weight = np.random.default_rng(7).normal(size=(channels, columns)).astype(np.float32)
    return weight, weight_scale(weight, 1, bits)


def slow_gptq(weight: Array, scale: Array, moments: Array, low: int, high: int) -> Array:
    """Channel by channel, the inverse of what is left of H updated each time (OBQ, in GPTQ's
    order): Δ_j -= Δ_i H⁻¹_ij / H⁻¹_ii, with a hundredth of the mean diagonal added to it."""
    count = len(weight)
    damped = moments + 0.01 * np.diag(moments).mean() * np.eye(count)
    left, codes = weight.astype(float).copy(), np.zeros(weight.shape)
    rest = sorted(range(count), key=lambda c: -moments[c, c])
    while rest:
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        first = rest[0]
        codes[first] = np.clip(np.rint(left[first] / scale), low, high)
        error = left[first] - codes[first] * scale
        for place, other in enumerate(rest[1:], 1):
            left[other] -= error * inverse[place, 0] / inverse[0, 0]
        rest = rest[1:]
    return codes


@pytest.mark.parametrize(("channels", "bits"), [(9, 8), (30, 3), (140, 4)])
def test_gptq_is_the_slow_one(channels: int, bits: int) -> None:
    weight, scale = layer(channels, 6, bits)
    moments = moments_of(channels)
    edge = 2 ** (bits - 1)
    expected = slow_gptq(weight, scale.astype(float), moments, -edge, edge - 1)
    plain = nearest(weight, scale, bits)
    best = loss(weight, scale, moments, expected.astype(np.int8)) < loss(
        weight, scale, moments, plain
    )
    np.testing.assert_array_equal(
        gptq(weight, scale, moments, bits), np.where(best, expected, plain)
    )


def slow_adaround(weight: Array, scale: Array, moments: Array, low: int, high: int) -> Array:
    """Adam (0.9, 0.999, 1e-8) on ΔᵀHΔ + 0.5 Σ (1 - |2h - 1|^β), 80 steps of 0.03, in steps of the
    scale and of H's mean diagonal; β from 20 to 2 by a cosine after the first fifth."""
    exact = weight.astype(float) / scale
    lower = np.clip(np.floor(exact), low, high - 1)
    h_matrix = moments / np.diag(moments).mean()
    inner = np.clip((np.clip(exact - lower, 0, 1) + 0.1) / 1.2, 1e-3, 1 - 1e-3)
    v = np.log(inner / (1 - inner))
    first, second = np.zeros_like(v), np.zeros_like(v)
    for step in range(80):
        sigmoid = 1 / (1 + np.exp(-v))
        h = np.clip(1.2 * sigmoid - 0.1, 0, 1)
        slope = 2 * h_matrix @ (lower + h - exact)
        done = (step / 80 - 0.2) / 0.8
        if done > 0:
            beta = 2 + 9 * (1 + math.cos(math.pi * done))
            away = 2 * h - 1
            slope -= 0.5 * 2 * beta * np.sign(away) * np.abs(away) ** (beta - 1)
        slope *= sigmoid * (1 - sigmoid) * 1.2
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        right = second / (1 - 0.999 ** (step + 1))
        v -= 0.03 * first / (1 - 0.9 ** (step + 1)) / (np.sqrt(right) + 1e-8)
    return np.asarray(lower + (v >= 0))


@pytest.mark.parametrize("bits", [3, 8])
def test_adaround_is_the_slow_one(bits: int) -> None:
    """float32 there: all codes but one in forty are the same, and the loss within 2 %."""
    weight, scale = layer(24, 30, bits)
    moments, edge = moments_of(24), 2 ** (bits - 1)
    found = adaround(weight, scale, moments, bits, iterations=80)
    expected = slow_adaround(weight, scale.astype(float), moments, -edge, edge - 1)
    plain = nearest(weight, scale, bits)
    better = loss(weight, scale, moments, expected.astype(np.int8)) < loss(
        weight, scale, moments, plain
    )
    expected = np.where(better, expected, plain).astype(np.int8)
    assert np.mean(found != expected) <= 0.025
    losses = [loss(weight, scale, moments, c).sum() for c in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_without_a_step_adaround_rounds_the_start() -> None:
    """No iteration: up where the weight is nearer to the upper code; scales of each row too."""
    weight, scale = layer(8, 5, 4)
    np.testing.assert_array_equal(
        adaround(weight, scale, moments_of(8), 4, iterations=0), nearest(weight, scale, 4)
    )
    wide = np.repeat(scale[None], 8, axis=0)
    both = [adaround(weight, s, moments_of(8), 4, iterations=40) for s in (wide, scale)]
    np.testing.assert_array_equal(*both)


def test_moments_of_few_rows() -> None:
    """ρ = K / (K + rows); no row at all counts as one."""
    moments = moments_of(3)
    for rows, part in ((0, 3 / 4), (1, 3 / 4), (9, 1 / 4)):
        expected = (1 - part) * moments + part * np.diag(np.diag(moments))
        np.testing.assert_allclose(shrunk(moments, rows), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7])
def test_a_clip_range_is_the_best_of_25(bits: int) -> None:
    """1, 0.975 … 0.4 of the largest, judged as stored; the first of equals."""
    weight = np.random.default_rng(bits).standard_t(3, (40, 12)).astype(np.float32)
    top, found = 2 ** (bits - 1) - 1, weight_scale(weight, 1, bits)
    shares = set()
    for column in range(12):
        w = weight[:, column].astype(float)
        best = math.inf
        for k in range(25):
            tried = float(np.float32(np.abs(w).max() / top * (1 - k / 40)))
            error = sum(
                (min(max(round(v / tried), -top - 1), top) * tried - v) ** 2 for v in w.tolist()
            )
            if error < best * (1 - 1e-9):
                best, expected, share = error, tried, k
        assert found[column] == pytest.approx(expected, rel=1e-6)
        shares.add(share)
    assert len(shares) > (1 if bits == 7 else 3)


def test_the_reader_of_a_convolution() -> None:
    """Σ W² per input channel over the outputs of its group and the kernel; |W| the largest of the
    kernel's places, times the root of their number; none with groups."""
    weight = np.random.default_rng(0).normal(size=(4, 3, 2, 5)).astype(np.float32)
    moment = np.arange(1.0, 4.0)
    found = Reader.of_convolution(weight, 1, moment)
    np.testing.assert_allclose(found.row_power, [(weight[:, c] ** 2).sum() for c in range(3)], 1e-5)
    for channel in range(3):
        for output in range(4):
            largest = np.abs(weight[output, channel]).max() * math.sqrt(10)
            assert found.magnitude[channel, output] == pytest.approx(largest, rel=1e-6)
    assert found.bits == Reader.of(weight[:, :, 0, 0], moment).bits == 8
    grouped = Reader.of_convolution(weight, 2, np.ones(6), bits=4)
    assert grouped.magnitude.shape == (6, 0)
    assert grouped.bits == 4
    expected = [(weight[2 * g : 2 * g + 2, c] ** 2).sum() for g in range(2) for c in range(3)]
    np.testing.assert_allclose(grouped.row_power, expected, rtol=1e-5)
    both = found.beside(Reader.of(weight[:, :, 0, 0].T, moment))
    assert both.magnitude.shape == (3, 8)
    np.testing.assert_allclose(
        both.row_power, found.row_power + (weight[:, :, 0, 0] ** 2).sum(axis=0), rtol=1e-6
    )
    np.testing.assert_array_equal(found.passed_on().row_power, found.row_power + 1)
