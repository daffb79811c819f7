"""What turning a stream chooses and claims, from all rows of its tensors in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from small_graph import run
from test_rotation import image_network, images, massive

from ptq_onnx.equalization.rotation_choice import Codes, Turns, turn_streams
from ptq_onnx.equalization.stream_trial import losses
from ptq_onnx.equalization.streams import find_streams
from ptq_onnx.numerics.rotations import flattened, spreading

Array = NDArray[np.float64]
D = 8
BATCHES = [images(k) for k in range(4)]


def tensors() -> dict[str, Array]:
    """The rows of what the two norms read, by name: 128 of each, so that all are kept."""
    model = massive(image_network())
    (stream,), _ = find_streams(model.graph)
    values = [n.inputs[0] for n in stream.norms]
    model.graph.outputs.extend(v for v in values if v is not None)
    found = [run(model, batch)[1:] for batch in BATCHES]
    return {
        str(v.name): np.concatenate([f[i].reshape(-1, D) for f in found]).astype(np.float64)
        for i, v in enumerate(values)
        if v is not None
    }


def best_range(rows: Array, weight: Array, levels: int, symmetric: bool) -> tuple[float, ...]:
    """Least Σ weight · (step² / 12 + mean of what is clipped, squared) of fifteen ranges."""
    low, high = min(rows.min(), 0), max(rows.max(), 0)
    if symmetric:
        low, high = -max(high, -low), max(high, -low)
    found = []
    for share in range(15):
        a, b = (end * (1 - 0.05 * share) for end in (low, high))
        beyond = ((rows - np.clip(rows, a, b)) ** 2).mean(axis=1)
        step = (b - a) / (levels - 1)
        found.append((float(weight @ (step**2 / 12 + beyond)), float(a), float(b)))
    return min(found, key=lambda one: one[0])


def expected(
    levels: int, symmetric: bool, of_stream: bool = True
) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    parts = []
    for rows in tensors().values():
        counts = np.full(len(rows), 1 / len(rows))
        variance = rows.var(axis=1)
        normed = (rows - rows.mean(axis=1, keepdims=True)) / np.sqrt(variance)[:, None]
        parts.append((rows, normed, counts, counts / (variance + 1e-6 * variance.mean())))
    most = max(parts, key=lambda p: float((p[0] ** 2).sum(axis=1) @ p[2]))
    centred = most[0] - most[0].mean(axis=1, keepdims=True)
    direction = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    tried = []
    for seed in range(-1, 16):
        spread = np.eye(D) if seed < 0 else spreading(D, seed)
        for how in ("spread", "spread, then flattened"):
            matrix = flattened(spread, direction) if "," in how and seed >= 0 else spread
            outer = [best_range(r @ matrix, p, levels, symmetric) for r, _, _, p in parts]
            inner = [best_range(n @ matrix, c, levels, symmetric) for _, n, c, _ in parts]
            score = sum(o[0] for o in outer) * of_stream, sum(i[0] for i in inner)
            largest = max(float(np.abs(r @ matrix).max()) for r, _, _, _ in parts)
            tried.append((sum(score), how if seed >= 0 else "none", max(seed, 0), score, largest,
                          outer))  # fmt: skip
    plain, best = tried[0], min(tried, key=lambda one: one[0])
    ratios = [10 * math.log10(b / a) if a else 0.0 for a, b in zip(best[3], plain[3], strict=True)]
    return {
        "by": best[1], "seed": best[2], "largest_before": plain[4], "largest_after": best[4],
        "stream_db": ratios[0], "norm_db": ratios[1],
    }, dict(zip(tensors(), [o[1:] for o in best[5]], strict=True))  # type: ignore[return-value] # fmt: skip


def turned(levels: int, symmetric: bool) -> Turns:
    return turn_streams(massive(image_network()), BATCHES, Codes(levels, symmetric), threads=1)


@pytest.mark.parametrize(("levels", "symmetric"), [(256, False), (16, True), (64, False)])
def test_the_choice_is_the_best_of_33(levels: int, symmetric: bool) -> None:
    """As it is, and 16 matrices, plain and with the massive direction made flat; what is said of
    it, and the ranges that were searched with it."""
    found, (wanted, ranges) = turned(levels, symmetric), expected(levels, symmetric)
    (one,) = found.turned
    assert (one.width, one.tensors, one.stream) == (D, 2, "/layernormalization5")
    assert (one.by, one.seed) == (wanted["by"], wanted["seed"])
    for name in ("largest_before", "largest_after", "stream_db", "norm_db"):
        assert getattr(one, name) == pytest.approx(wanted[name], rel=1e-4), name
    assert found.ranges.keys() == ranges.keys()
    tried = np.multiply.outer(2.0 ** (np.arange(-4, 8) / 8), 2.0 ** (np.array([-1, 0, 1, 2]) / 4))
    for name, ends in found.ranges.items():
        factor = ends[1] / ranges[name][1]  # of the refinement by the outputs
        assert ends == pytest.approx(np.multiply(ranges[name], factor), rel=1e-4)
        assert np.abs(tried / factor - 1).min() < 1e-4
    assert one.refined_db > 0
    assert found.changed
    assert found.to_json()["turned"][0]["seed"] == one.seed


def test_norms_alone_choose_where_the_stream_is_not_quantized() -> None:
    """Nothing is lost in the stream then, nor won: 0 dB."""
    model = massive(image_network())
    found = turn_streams(model, BATCHES, Codes(16, False, of_stream=False), threads=1)
    wanted, _ = expected(16, False, of_stream=False)
    (one,) = found.turned
    assert (one.by, one.seed, one.stream_db) == (wanted["by"], wanted["seed"], 0.0)
    assert one.norm_db == pytest.approx(wanted["norm_db"], rel=1e-4)
    assert one.refined_db == 0.0


def test_what_is_lost_of_an_output_of_zeros_has_an_end() -> None:
    zeros, ones = ([np.full((2, 3), v, np.float32)] for v in (0, 1))
    assert [*losses([zeros], [zeros])] == [*losses([ones], [ones])] == [0]
    assert [*losses([ones], [zeros])] == pytest.approx([6e30])
    assert [*losses([zeros, zeros], [ones, ones])] == [0.5, 1]
