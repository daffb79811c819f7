"""Attention values: levels, ranks, ranking loss and rollout against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from prepared_models import DIGITS, images, prepared, quantized

from ptq_onnx.analysis.attention_values import (
    LOG2,
    LOWEST,
    UNIFORM,
    attention_values,
    discordant,
    levels,
    rank_correlation,
    ranks,
    rollout,
    round_attention,
)
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.numerics.codes.code import Code


def softmax(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    x = np.exp(3 * np.random.default_rng(seed).normal(size=shape))
    return (x / x.sum(axis=-1, keepdims=True)).astype(np.float32)


def test_levels() -> None:
    np.testing.assert_allclose(levels(UNIFORM, 4), np.arange(16) / 15)
    np.testing.assert_allclose(levels(LOG2, 4), [0, *(2.0**-k for k in range(14, -1, -1))])
    assert len(levels(UNIFORM, 8)) == 256


@pytest.mark.parametrize(("code", "bits"), [(UNIFORM, 4), (UNIFORM, 8), (LOG2, 4)])
def test_rounding_gives_levels(code: Code, bits: int) -> None:
    maps = softmax((2, 3, 20, 20))
    found = np.unique(round_attention(maps, code, bits))
    known = levels(code, bits)
    assert all(np.isclose(known, v, rtol=1e-6, atol=1e-9).any() for v in found)


def test_ranks_share_ties() -> None:
    got = ranks(np.array([[3, 1, 2, 1], [5, 5, 5, 5], [1, 2, 3, 4]], np.float32))
    np.testing.assert_array_equal(got, [[3, 0.5, 2, 0.5], [1.5] * 4, [0, 1, 2, 3]])


def test_rank_correlation_is_pearson_of_ranks() -> None:
    one, other = softmax((5, 30)), softmax((5, 30), 1)
    got = rank_correlation(one, other)
    for row, a, b in zip(got, ranks(one), ranks(other), strict=True):
        assert row == pytest.approx(np.corrcoef(a, b)[0, 1])
    np.testing.assert_allclose(rank_correlation(one, one), 1)
    np.testing.assert_allclose(rank_correlation(one, -one), -1)
    flat = np.zeros((5, 30), np.float32)
    np.testing.assert_array_equal(rank_correlation(one, flat), 0)
    np.testing.assert_array_equal(rank_correlation(flat, flat), 1)


def test_discordant_counts_pairs() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.integers(0, 5, (4, 9)), rng.integers(0, 5, (4, 9))
    got = discordant(one.astype(np.float32), other.astype(np.float32))
    for row, a, b in zip(got, one, other, strict=True):
        pairs = [(i, j) for i, j in itertools.combinations(range(9), 2) if a[i] != a[j]]
        wrong = sum(np.sign(a[i] - a[j]) != np.sign(b[i] - b[j]) for i, j in pairs)
        assert row == pytest.approx(wrong / len(pairs))


def test_rollout_is_the_product_of_mixed_maps() -> None:
    maps = [softmax((2, 6, 6), seed) for seed in range(3)]
    expected = np.eye(6)
    for one in maps:
        expected = (0.5 * one.mean(axis=0) + 0.5 * np.eye(6)) @ expected
    np.testing.assert_allclose(rollout(maps), expected, rtol=1e-5)
    np.testing.assert_allclose(rollout(maps).sum(axis=1), 1, rtol=1e-5)


def test_analysis_of_the_embedded_model() -> None:
    p, quantizer = prepared(DIGITS), quantized(quantizer="fqvit")
    batches = [(["a", "b"], images()[:2]), (["c"], images()[2:4])]
    reference = Simulator(p.model, None, threads=1)
    found = attention_values(
        p.model, p.blocks, reference, Simulator(p.model, quantizer, threads=1), batches
    )
    assert found is not None
    assert found.images == 3
    assert [b.block for b in found.blocks] == list(range(p.blocks.count))
    name = next(s.tensor for s in p.sites.values() if (s.role, s.block) == ("softmax", 0))
    maps = np.concatenate([reference.run(b, [name])[name] for _, b in batches])[:3]
    first = found.blocks[0]
    assert first.heads == maps.shape[1]
    assert sum(first.counts) == maps.size
    edges = 2.0 ** (LOWEST + np.arange(len(first.counts)) / 2)
    expected = np.histogram(maps, [0, *edges[1:], 2])[0]
    assert np.abs(np.array(first.counts) - expected).sum() <= 0.001 * maps.size
    by_code = {(c.code, c.bits): c for c in first.codes}
    rounded = round_attention(maps, LOG2, 4)
    got = by_code["log2", 4]
    snr = -10 * np.log10(((rounded - maps) ** 2).sum() / (maps.astype(float) ** 2).sum())
    assert got.snr_db == pytest.approx(snr, abs=0.01)
    sums = rounded.sum(axis=-1)
    assert got.row_sum == pytest.approx((sums.min(), sums.mean(), sums.max()), rel=1e-4)
    assert got.zero == pytest.approx((rounded == 0).mean())
    # Four uniform bits lose the order of small values, which log2 codes keep.
    assert by_code["uniform", 8].rank > by_code["uniform", 4].rank
    assert by_code["log2", 4].rank > by_code["uniform", 4].rank
    assert by_code["log2", 4].discordant < by_code["uniform", 4].discordant
    assert found.rollout is not None
    assert np.shape(found.rollout.float_map) == (8, 8)
    assert 0.5 < found.rollout.correlation <= 1
    assert found.rollout.image_name == "a"
