"""Samples of rows: of fixed size, even over the stream, channels as the sites have them."""

from __future__ import annotations

import numpy as np
import pytest

from ptq_onnx.calibration import row_samples
from ptq_onnx.calibration.row_samples import EvenSample, channels_last, groups
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
