"""Samples of rows: of fixed size, even over the stream, channels as the sites have them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from small_graph import SmallGraph

from ptq_onnx.calibration import row_samples
from ptq_onnx.calibration.row_samples import (
    EvenSample,
    channels_last,
    collect_rows,
    groups,
    row_means,
)
from ptq_onnx.numerics.spec import Site


def test_every_row_is_as_likely() -> None:
    sample = EvenSample(0, count=400)
    for start in range(0, 4000, 50):
        sample.add(np.arange(start, start + 50, dtype=np.float32)[:, None])
    rows = sample.rows[:, 0]
    assert sample.rows.shape == (400, 1)
    assert len(np.unique(rows)) == 400
    counts = np.histogram(rows, bins=4, range=(0, 4000))[0]
    assert counts.min() > 70
    assert counts.max() < 130


def test_a_short_stream_is_kept_whole() -> None:
    sample = EvenSample(0, count=400)
    x = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    sample.add(x[:10])
    sample.add(x[10:])
    np.testing.assert_array_equal(np.sort(sample.rows, axis=0), np.sort(x, axis=0))


def test_the_same_rows_whatever_the_batches() -> None:
    x = np.random.default_rng(0).normal(size=(2000, 2)).astype(np.float32)
    found = []
    for size in (2000, 37):
        sample = EvenSample(3, count=100)
        for start in range(0, 2000, size):
            sample.add(x[start : start + size])
        found.append(np.sort(sample.rows, axis=0))
    np.testing.assert_array_equal(*found)


def test_rows_are_there_as_often_as_they_count() -> None:
    """Of 40,000 rows, whatever the batches: a fraction in the mean, whole numbers exactly."""
    counts = np.tile(np.array([0.0, 0.25, 1.0, 2.75], np.float32), 10_000)
    x = np.tile(np.arange(4, dtype=np.float32), 10_000)[:, None]
    found = []
    for size in (40_000, 1000):
        sample = EvenSample(3)
        parts = range(0, len(x), size)
        drawn = [sample.drawn(x[i : i + size], counts[i : i + size]) for i in parts]
        found.append(np.concatenate(drawn))
    np.testing.assert_array_equal(*found)
    often = np.bincount(found[0][:, 0].astype(int), minlength=4) / 10_000
    np.testing.assert_allclose(often[[0, 2]], [0, 1])
    np.testing.assert_allclose(often[[1, 3]], [0.25, 2.75], atol=0.015)


def test_samples_and_means_count_rows_as_they_are_told() -> None:
    """A tensor [B, 4, 3] whose rows at position 2 count all, as in float64."""
    g = SmallGraph(("batch", 4, 3))
    model = g.model(g("Mul", "x", np.full(1, 2.0)))
    made = str(model.graph.outputs[0].name)
    x = np.random.default_rng(0).normal(size=(10, 4, 3)).astype(np.float32)
    asked = []

    def counting(tensor: str, places: Sequence[int]) -> NDArray[np.float32]:
        asked.append((tensor, tuple(places)))
        return np.broadcast_to(np.array([0, 0, 4, 0], np.float32), places).reshape(-1)

    of = Site(made, "norm1", 0, (2,), ("batch", 4, 3), None, ())
    (samples,) = collect_rows(model.clone(), [of], [x[:7], x[7:]], counting=counting)
    expected = np.repeat(2 * x[:, 2], 4, axis=0)
    np.testing.assert_array_equal(np.sort(samples[made], axis=0), np.sort(expected, axis=0))
    assert asked == [(made, (7, 4)), (made, (3, 4))]
    found = row_means(model, [made, "x"], [x[:7], x[7:]], counting)
    assert found.keys() == {made, "x"}
    np.testing.assert_allclose(found["x"], x[:, 2].mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found[made], 2 * x[:, 2].mean(axis=0, dtype=np.float64), rtol=1e-6)


def test_channels_are_last_heads_first() -> None:
    value = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(np.float32)
    rows = channels_last(value, (1, 3))  # v: [batch, heads, tokens, channels]
    assert rows.shape == (8, 15)
    np.testing.assert_array_equal(rows[1], value[0, :, 1, :].ravel())
    keys = channels_last(value, (1, 2))  # k: [batch, heads, channels, tokens]
    np.testing.assert_array_equal(keys[0], value[0, :, :, 0].ravel())


def site(tensor: str, block: int | None) -> Site:
    return Site(tensor, "q", block, (1,), ("batch", 8), None, ())


def test_sites_of_a_block_are_sampled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = [site("a", None), site("b", 0), site("c", 0), site("d", 1)]
    assert [[s.tensor for s in g] for g in groups(sites)] == [["a", "b", "c", "d"]]
    monkeypatch.setattr(row_samples, "LIMIT", 2 * 4 * row_samples.ROWS * 8)
    assert [[s.tensor for s in g] for g in groups(sites)] == [["a"], ["b", "c"], ["d"]]
