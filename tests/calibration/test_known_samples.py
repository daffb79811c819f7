"""What is kept of streams of rows and of products, against all of them at once."""

from __future__ import annotations

import numpy as np
import pytest
from small_graph import SmallGraph, sample

from ptq_onnx.calibration.histogram import Histogram
from ptq_onnx.calibration.mean_centred import rows_sum_to_one, static_tokens, takes_centring
from ptq_onnx.calibration.moments import collect_moments
from ptq_onnx.calibration.product_samples import PairSample, RowSample, Wanted, collect_samples
from ptq_onnx.errors import ModelError


def test_the_largest_64_rows_and_192_others() -> None:
    """The others stand for all that were left out; what is drawn does not depend on the cut."""
    rows = sample(1000, 3, seed=1) * np.float32([1, 5, 1])
    kept = RowSample(3)
    for part in np.split(rows, [100, 101, 600]):
        kept.add(part)
    assert (kept.seen, kept.rows.shape) == (1000, (256, 3))
    size = np.abs(rows).max(axis=1)
    order = np.argsort(-size, kind="stable")
    np.testing.assert_array_equal(kept.rows[:64], rows[order[:64]])
    np.testing.assert_array_equal(kept.weight, [1.0] * 64 + [936 / 192] * 192)
    keys = np.random.default_rng(0).random(1000)
    usual = order[64:][np.argsort(keys[order[64:]])[:192]]
    whole = RowSample(3)
    whole.add(rows)
    np.testing.assert_array_equal(whole.rows[64:], rows[usual])


def test_few_rows_are_all_kept() -> None:
    kept = RowSample(2)
    kept.add(sample(40, 2))
    np.testing.assert_array_equal(kept.weight, np.ones(40))
    kept.add(sample(40, 2, seed=1))
    np.testing.assert_array_equal(kept.weight, np.ones(80))
    assert len(kept.rows) == 80


def test_a_row_is_as_large_as_over_its_factor() -> None:
    rows = np.zeros((100, 2), np.float32)
    rows[:, 0] = 8 + np.arange(100) / 100
    rows[3] = [0, 9]
    kept = RowSample(2)
    kept.add(rows, np.float32([8, 1]))
    np.testing.assert_array_equal(kept.rows[0], [0, 9])
    np.testing.assert_array_equal(kept.rows[1], rows[99])


def test_the_24_products_with_the_smallest_draws() -> None:
    """One draw per head and image, 64 rows of the first factor in a drawn order."""
    first, second = sample(30, 2, 70, 3, seed=1), sample(30, 2, 3, 4, seed=2)
    pairs = PairSample(5)
    for cut in (slice(0, 7), slice(7, 30)):
        pairs.add(first[cut], second[cut])
    drawn = []
    for image in range(30):
        random = np.random.default_rng((5, image))
        keys = random.random(2)
        drawn += [(keys[head], image, head) for head in range(2)]
    wanted = sorted(drawn)[:24]
    left, right = pairs.factors
    assert (left.shape, right.shape) == ((24, 64, 3), (24, 3, 4))
    for number, (_, image, head) in enumerate(wanted):
        np.testing.assert_array_equal(right[number], second[image, head])
        rows = {tuple(r) for r in first[image, head].tolist()}
        assert {tuple(r) for r in left[number].tolist()} <= rows
        assert len({tuple(r) for r in left[number].tolist()}) == 64
    places = [(i if i < 7 else i - 7, h) for _, i, h in wanted]
    assert pairs.places == places
    assert pairs.lead == (23, 2)


@pytest.mark.parametrize("seed", range(12))
def test_every_small_draw_is_kept(seed: int) -> None:
    """Also one between the last two of those that were kept so far."""
    pairs = PairSample(seed)
    pairs.add(sample(80, 2, 1, 1), sample(80, 2, 1, 1))
    drawn = []
    for image in range(80):
        keys = np.random.default_rng((seed, image)).random(2)
        drawn += [(keys[head], (image, head)) for head in range(2)]
    assert pairs.places == [place for _, place in sorted(drawn)[:24]]


def test_products_without_leading_axes_and_broadcast_ones() -> None:
    pairs = PairSample()
    pairs.add(sample(5, 3), sample(3, 4))
    assert pairs.places == [()]
    assert pairs.factors[0].shape == (1, 5, 3)
    wide = PairSample()
    wide.add(sample(2, 1, 5, 3), sample(4, 3, 6))
    assert wide.lead == (2, 4)
    assert sorted(wide.places) == [(i, h) for i in range(2) for h in range(4)]


def test_samples_of_a_graph() -> None:
    """Rows of a tensor, of the input too, and the factors of a product; copies count once."""
    g = SmallGraph(("batch", 5, 4))
    doubled = g("Mul", "x", 2.0)
    turned = g("Transpose", doubled, perm=[0, 2, 1])
    model = g.model(g("MatMul", doubled, turned))
    x = sample(6, 5, 4)

    class Batches(list):  # type: ignore[type-arg]
        copies = 2

    seen: list[int] = []
    rows, pairs = collect_samples(
        model,
        Wanted(
            {n: (lambda a: a.reshape(-1, 4), None) for n in ("x", doubled)},
            {"p": (doubled, turned)},
        ),
        Batches([np.concatenate([x[:4]] * 2), np.concatenate([x[4:]] * 2)]),
        threads=1,
        progress=seen.append,
    )
    assert seen == [4, 2]
    assert rows["x"].seen == rows[doubled].seen == 30
    found = {tuple(r) for r in rows[doubled].rows.tolist()}
    assert found == {tuple(r) for r in (2 * x).reshape(-1, 4).tolist()}
    assert len(pairs["p"].places) == 6
    left, right = pairs["p"].factors
    for one, other in zip(left, right, strict=True):
        assert {tuple(r) for r in one.tolist()} == {tuple(r) for r in other.T.tolist()}


@pytest.mark.parametrize(
    ("low", "high", "first", "begin"),
    [
        (-1.0, 1.0, 992, -0.03125),
        (0.0, 2.0, 0, 0.0),
        (-2.0, 0.0, 1984, -0.0625),
        (-1.0, 3.0, 480, -0.0625),
        (1.0, 3.0, 0, 1.0),
        (-3.0, -1.0, 1984, -1.0625),
    ],
)
def test_a_thirty_second_around_zero_is_counted_again(
    low: float, high: float, first: int, begin: float
) -> None:
    """64 of the 2048 bins in 1024, zero in their middle or as near to it as there are bins."""
    whole = Histogram.over(np.float32([low]), np.float32([high]))
    assert whole.start is not None
    assert whole.inner is not None
    assert whole.inner.inner is not None
    assert whole.inner.inner.inner is None
    assert (whole.counts.shape, whole.inner.counts.shape) == ((1, 2048), (1, 1024))
    assert whole.start[0] == first
    assert whole.inner.low[0] == pytest.approx(begin)
    assert whole.inner.high[0] - whole.inner.low[0] == pytest.approx((high - low) / 32)
    third = whole.inner.inner
    assert third.high[0] - third.low[0] == pytest.approx((high - low) / 1024)
    edges, counts = whole.finest
    assert edges.shape == (1, counts.shape[1] + 1) == (1, 2048 - 64 + 1024 - 32 + 1024 + 1)
    np.testing.assert_allclose(edges[0, [0, -1]], [low, high])
    assert (np.diff(edges) > 0).all()


def test_two_moments_that_are_not_finite() -> None:
    """A mean that is, beside squares that are not."""
    g = SmallGraph(("batch", 4, 2))
    model = g.model(g("Mul", "x", 1.0))
    x = sample(3, 4, 2) * np.float32(1e30)
    with pytest.raises(ModelError, match="second moments of tensor 'mul0' are NaN or infinite"):
        list(collect_moments(model, {"mul0": 2}, [x], threads=1))


def test_what_takes_centring() -> None:
    """V of a known number of tokens, made by a layout op, read by A·V alone, A a softmax."""

    def network(tokens: int | str = 6, axis: int = -1, act: str = "Softmax", layout: bool = True):  # type: ignore[no-untyped-def]
        g = SmallGraph(("batch", 2, tokens, 4))
        scores = g("MatMul", "x", g("Transpose", "x", perm=[0, 1, 3, 2]))
        a = g(act, scores, axis=axis) if act == "Softmax" else g(act, scores)
        v = g("Identity", "x") if layout else g("Neg", "x")
        out = g("MatMul", a, v)
        model = g.model(out)
        nodes = list(model.graph)
        return nodes[-1], next(n.outputs[0] for n in nodes if n.outputs[0].name == v)

    product, value = network()
    assert rows_sum_to_one(product)
    assert static_tokens(value) == 6
    assert takes_centring(value)
    for options in ({"axis": 3}, {"axis": -1}):
        assert rows_sum_to_one(network(**options)[0])
    for options in ({"axis": 2}, {"axis": -2}, {"act": "Sigmoid"}):
        assert not rows_sum_to_one(network(**options)[0])
        assert not takes_centring(network(**options)[1])
    assert static_tokens(network("tokens")[1]) == 0
    assert not takes_centring(network("tokens")[1])
    assert not takes_centring(network(layout=False)[1])
    scores = next(n for n in product.graph if n.op_type == "MatMul")
    assert not rows_sum_to_one(scores)
