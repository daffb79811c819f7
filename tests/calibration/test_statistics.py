"""Statistics of a real graph against NumPy over all images at once."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_graph import SmallGraph, sample

from ptq_onnx.calibration.methods import ChannelStatistics, Histogram, add_histograms, collect
from ptq_onnx.calibration.statistics import BINS, TOP, reduced_shape
from ptq_onnx.errors import ModelError
from ptq_onnx.evaluation.network import session
from ptq_onnx.images.opening import METADATA_KEY, Preprocess, open_images
from ptq_onnx.numerics.spec import Site
from ptq_onnx.preparation.model_files import serialize
from ptq_onnx.preparation.prepare import Prepared, prepare

Array = NDArray[np.float32]
ROOT = Path(__file__).resolve().parents[2]


def site(tensor: str, shape: tuple[int | str, ...], axes: tuple[int, ...]) -> Site:
    return Site(tensor, "other", None, axes, shape, None, ())


SHAPE = ("batch", 5, 8)
SITES = [
    site("x", SHAPE, (2,)),
    site("doubled", SHAPE, (2,)),
    site("turned", ("batch", 8, 5), (1,)),
    site("heads", ("batch", 2, 5, 4), (1, 3)),
    site("whole", SHAPE, ()),
    site("pooled", ("batch", 8), (1,)),
]


@pytest.fixture(scope="module")
def model() -> ir.Model:
    """x → 2x → transposed, split in heads, GELU'd, averaged: channels everywhere."""
    g = SmallGraph(SHAPE)
    g("Mul", "x", 2.0)
    g.nodes[-1].output[0] = "doubled"
    g("Transpose", "doubled", perm=[0, 2, 1])
    g.nodes[-1].output[0] = "turned"
    g("Reshape", "doubled", np.array([0, 5, 2, 4]))
    g.nodes[-1].output[0] = "split"
    g("Transpose", "split", perm=[0, 2, 1, 3])
    g.nodes[-1].output[0] = "heads"
    g("Sigmoid", "doubled")
    g.nodes[-1].output[0] = "whole"
    g("ReduceMean", "whole", np.array([1]), keepdims=0)
    g.nodes[-1].output[0] = "pooled"
    return g.model("turned", "heads", "pooled")


def values_of(x: Array) -> dict[str, NDArray[np.float64]]:
    """All tensors of the graph in NumPy."""
    doubled = 2 * x.astype(np.float64)
    whole = 1 / (1 + np.exp(-doubled))
    return {
        "x": x.astype(np.float64),
        "doubled": doubled,
        "turned": doubled.transpose(0, 2, 1),
        "heads": doubled.reshape(-1, 5, 2, 4).transpose(0, 2, 1, 3),
        "whole": whole,
        "pooled": whole.mean(axis=1),
    }


def rows_of(value: NDArray[np.float64], axes: tuple[int, ...]) -> NDArray[np.float64]:
    """[images, C, values]: channels by ``axes``, in order."""
    others = [a for a in range(1, value.ndim) if a not in axes]
    size = int(np.prod([value.shape[a] for a in axes]))
    return value.transpose(0, *axes, *others).reshape(len(value), size, -1)


@pytest.mark.parametrize("batch", [1, 7, 30])
def test_statistics_are_numpys_over_all_images(model: ir.Model, batch: int) -> None:
    x = sample(30, 5, 8, seed=3) * np.linspace(0.1, 9, 8, dtype=np.float32)
    batches = [x[i : i + batch] for i in range(0, 30, batch)]
    seen: list[int] = []
    stats = collect(model, SITES, batches, threads=1, progress=seen.append)
    assert (stats.images, sum(seen)) == (30, 30)
    for one in SITES:
        rows = rows_of(values_of(x)[one.tensor], one.channel_axes)
        found = stats.channels[one.tensor]
        assert (found.images, found.count) == (30, 30 * rows.shape[2])
        assert found.shape == reduced_shape(one)
        high = -np.sort(-rows.max(axis=2), axis=0)[:TOP]
        low = np.sort(rows.min(axis=2), axis=0)[:TOP]
        np.testing.assert_allclose(found.highest, high, rtol=1e-6, atol=1e-7, err_msg=one.tensor)
        np.testing.assert_allclose(found.lowest, low, rtol=1e-6, atol=1e-7, err_msg=one.tensor)
        power = (rows**2).sum(axis=(0, 2))
        np.testing.assert_allclose(found.power, power, rtol=1e-5, err_msg=one.tensor)
        np.testing.assert_allclose(found.second_moment, (rows**2).mean(axis=(0, 2)), rtol=1e-5)
        whole = found.pooled()
        assert whole.highest[0, 0] == found.highest.max()
        assert whole.lowest[0, 0] == found.lowest.min()
        assert whole.count == rows.size
        np.testing.assert_allclose(whole.second_moment, (rows**2).mean(), rtol=1e-5)


def test_shapes_broadcast_against_the_tensor(model: ir.Model) -> None:
    assert [reduced_shape(s) for s in SITES] == [
        (1, 8),
        (1, 8),
        (8, 1),
        (2, 1, 4),
        (1, 1),
        (8,),
    ]


def test_memory_does_not_grow(model: ir.Model) -> None:
    """What is kept after 200 images is what was kept after 20."""

    def kept(images: int) -> int:
        batches = (sample(5, 5, 8, seed=i) for i in range(images // 5))
        channels = collect(model, SITES, batches, threads=1).channels.values()
        return sum(
            a.nbytes for c in channels for a in vars(c).values() if isinstance(a, np.ndarray)
        )

    assert kept(200) == kept(20)
    assert TOP <= 64


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_refused(model: ir.Model, bad: float) -> None:
    x = sample(4, 5, 8)
    x[2, 1, 3] = bad
    with pytest.raises(ModelError, match=r"Tensor 'x'.*NaN or infinite") as error:
        collect(model, SITES, [x], threads=1)
    assert "\n" not in str(error.value)


def test_the_tensor_where_it_begins_is_named() -> None:
    """log of a negative value: the input is fine, what is made of it is not."""
    g = SmallGraph(SHAPE)
    first = g("Relu", "x")
    second = g("Log", "x")
    sites = [site(name, SHAPE, (2,)) for name in ("x", first, second)]
    with pytest.raises(ModelError, match=f"Tensor '{re.escape(second)}'"):
        collect(g.model(second, first), sites, [sample(4, 5, 8)], threads=1)


# --- histograms -------------------------------------------------------------------------------


def test_histograms_count_every_value(model: ir.Model) -> None:
    x = sample(12, 5, 8, seed=5) * np.linspace(0.1, 9, 8, dtype=np.float32)
    batches = [x[:5], x[5:]]
    for wide in (set(), {s.tensor for s in SITES if s.channel_axes}):
        stats = collect(model, SITES, batches, threads=1)
        add_histograms(model, stats, SITES, wide, batches, threads=1)
        for one in SITES:
            rows = rows_of(values_of(x)[one.tensor], one.channel_axes)
            rows = rows.transpose(1, 0, 2).reshape(rows.shape[1], -1)
            if one.tensor not in wide:
                rows = rows.reshape(1, -1)
            found = stats.histograms[one.tensor]
            assert found.counts.shape == (len(rows), BINS)
            np.testing.assert_array_equal(found.counts.sum(axis=1), rows.shape[1])
            np.testing.assert_allclose(found.low, rows.min(axis=1), rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(found.high, rows.max(axis=1), rtol=1e-6, atol=1e-7)
            for row, counts, low, high in zip(
                rows, found.counts, found.low, found.high, strict=True
            ):
                # A value may fall in the bin beside: float32 against float64 at an edge.
                exact = np.sort(np.clip((row - low) / (high - low) * BINS, 0, BINS - 1).astype(int))
                mine = np.repeat(np.arange(BINS), counts)
                assert np.abs(mine - exact).max() <= 1
                assert np.mean(mine == exact) > 0.95


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_every_value_is_counted_once_and_in_its_place(
    seed: int, shift: float, width: float
) -> None:
    rng = np.random.default_rng(seed)
    rows = (rng.uniform(0, width, (3, 200)) + shift).astype(np.float32)
    histogram = Histogram.over(rows.min(axis=1), rows.max(axis=1))
    for part in np.split(rows, 4, axis=1):
        histogram.add(part)
    np.testing.assert_array_equal(histogram.counts.sum(axis=1), 200)
    assert np.all(histogram.counts[:, 0] >= 1)
    assert np.all((histogram.counts[:, -1] >= 1) | (rows.min(axis=1) == rows.max(axis=1)))
    bin_width = (histogram.high - histogram.low) / BINS
    mean = (histogram.counts * histogram.centres).sum(axis=1) / 200
    fuzz = 1e-6 * np.abs(rows).max()
    assert np.all(np.abs(mean - rows.astype(np.float64).mean(axis=1)) <= bin_width + fuzz)


def test_known_bins() -> None:
    histogram = Histogram.over(np.float32([0.0]), np.float32([BINS]))
    histogram.add(np.float32([[0, 0.5, 1, 1.5, 7.99, BINS - 1, BINS]]))
    expected = np.zeros(BINS, int)
    expected[[0, 1, 7, BINS - 1]] = [2, 2, 1, 2]
    np.testing.assert_array_equal(histogram.counts[0], expected)
    np.testing.assert_array_equal(histogram.centres[0, :3], [0.5, 1.5, 2.5])


@pytest.mark.parametrize("outside", [1.5, 100.0, 1e6, 1e12, 3e38])
def test_values_outside_go_to_the_edges(outside: float) -> None:
    histogram = Histogram.over(np.float32([-1.0]), np.float32([1.0]))
    with np.errstate(over="ignore"):
        histogram.add(np.float32([[outside, outside, -outside]]))
    assert (histogram.counts[0, 0], histogram.counts[0, -1]) == (1, 2)


@pytest.mark.parametrize("value", [0.0, 1.0, -7.0, 1e5, -1e30, 1e-40])
@pytest.mark.filterwarnings("error")
def test_a_constant_has_a_histogram(value: float) -> None:
    ends = np.float32([value])
    histogram = Histogram.over(ends, ends)
    histogram.add(np.full((1, 9), value, np.float32))
    assert histogram.counts.sum() == histogram.counts[0, 0] == 9
    assert histogram.centres[0, 0] == pytest.approx(np.float32(value), rel=1e-6, abs=1e-9)


# --- on the embedded model --------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Prepared:
    return prepare(ROOT / "models/digits_vit.onnx")


@pytest.fixture(scope="module")
def images(digits: Prepared) -> list[Array]:
    preprocess = Preprocess.from_json(digits.model.metadata_props[METADATA_KEY])
    return list(open_images(ROOT / "img/digits/calib", preprocess, limit=12).batches(4))


def test_sites_of_a_real_model(digits: Prepared, images: list[Array]) -> None:
    """Extremes and power of every site of the model, from its raw tensors."""
    sites = [s for s in digits.sites.values() if not s.is_parameter]
    stats = collect(digits.model, sites, images, threads=1)
    add_histograms(digits.model, stats, sites, set(), images, threads=1)
    tapped = digits.model.clone()
    made = {v.name: v for node in tapped.graph for v in node.outputs}
    tapped.graph.outputs.extend(
        made[s.tensor] for s in sites if s.tensor in made and not made[s.tensor].is_graph_output()
    )
    ort = session(serialize(tapped), 1, cpu=True)
    names = [o.name for o in ort.get_outputs()]
    raw = dict(zip(names, ort.run(names, {"input": np.concatenate(images)}), strict=True))
    raw["input"] = np.concatenate(images)
    for one in sites:
        value = raw[one.tensor]
        rows = rows_of(value.astype(np.float64), one.channel_axes)
        found = stats.channels[one.tensor]
        fuzz = 1e-4 * np.abs(value).max()
        np.testing.assert_allclose(found.highest[0], rows.max(axis=(0, 2)), atol=fuzz)
        np.testing.assert_allclose(found.lowest[0], rows.min(axis=(0, 2)), atol=fuzz)
        expected = (rows**2).mean(axis=(0, 2))
        np.testing.assert_allclose(found.second_moment, expected, rtol=1e-3, atol=fuzz**2)
        assert stats.histograms[one.tensor].counts.sum() == value.size


def test_batches_do_not_matter(digits: Prepared, images: list[Array]) -> None:
    sites = [s for s in digits.sites.values() if not s.is_parameter]

    def single() -> Iterator[Array]:
        for batch in images:
            yield from np.split(batch, len(batch))

    one = collect(digits.model, sites, images, threads=1).channels
    other = collect(digits.model, sites, single(), threads=1).channels
    for name, stats in one.items():
        fuzz = 1e-5 * max(
            float(np.abs(stats.highest[0]).max()), float(np.abs(stats.lowest[0]).max())
        )
        np.testing.assert_allclose(stats.highest[:12], other[name].highest[:12], atol=fuzz)
        np.testing.assert_allclose(stats.lowest[:12], other[name].lowest[:12], atol=fuzz)
        np.testing.assert_allclose(stats.power, other[name].power, rtol=1e-3, atol=1e-6)


def test_an_empty_stream_leaves_nothing(digits: Prepared) -> None:
    sites = [s for s in digits.sites.values() if not s.is_parameter][:1]
    stats = collect(digits.model, sites, [], threads=1)
    assert stats.images == 0
    assert isinstance(stats.channels[sites[0].tensor], ChannelStatistics)
    assert stats.channels[sites[0].tensor].count == 0


def test_windows_belong_to_their_image() -> None:
    """Extremes are of images, several rows of which are windows, or of a batch with one row."""
    g = SmallGraph(("batch", 8, 4))
    g("Reshape", g("Neg", "x"), np.array([-1, 2, 4]))
    g.nodes[-1].output[0] = "windows"
    g("ReduceMax", "x", np.array([0]), keepdims=1)
    g.nodes[-1].output[0] = "most"
    model = g.model("windows", "most")
    batches = [sample(3, 8, 4, seed=seed) for seed in range(2)]
    sites = [site("windows", ("windows", 2, 4), (2,)), site("most", (1, 8, 4), (2,))]
    found = collect(model, sites, batches, threads=1)
    images, windows = -np.concatenate(batches), found.channels["windows"]
    assert windows.images == 6
    np.testing.assert_array_equal(windows.highest[:6], -np.sort(-images.max(axis=1), axis=0))
    np.testing.assert_array_equal(windows.lowest[:6], np.sort(images.min(axis=1), axis=0))
    assert windows.count == images[..., 0].size
    rows, most = np.stack([batch.max(axis=0) for batch in batches]), found.channels["most"]
    assert most.images == 2
    np.testing.assert_array_equal(most.highest[:2], -np.sort(-rows.max(axis=1), axis=0))
