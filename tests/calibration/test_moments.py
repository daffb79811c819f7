"""Second moments from the graph against NumPy over all rows at once."""

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, sample

from ptq_onnx.calibration.moments import Moments, collect_moments, groups
from ptq_onnx.errors import ModelError
from ptq_onnx.fusion.rules import fuse

IMAGES = sample(10, 3, 4, 4, seed=5) + 30.0
"""Their mean is large beside their spread: where sums of squares cancel."""
BATCHES = [IMAGES[:4], IMAGES[4:8], IMAGES[8:]]


@pytest.fixture(scope="module")
def model() -> ir.Model:
    """x [B, 3, 4, 4] → rows [B, 16, 3] → a linear → GELU → a linear."""
    g = SmallGraph(("batch", 3, 4, 4))
    rows = g("Transpose", g("Reshape", "x", np.array([0, 3, 16])), perm=[0, 2, 1])
    hidden = g("Add", g("MatMul", rows, sample(3, 6, seed=1)), sample(6, seed=2))
    out = g("Add", g("MatMul", g("Gelu", hidden), sample(6, 2, seed=3)), sample(2, seed=4))
    found = g.model(out)
    fuse(found)
    return found


def rows() -> np.ndarray:
    return IMAGES.reshape(10, 3, 16).transpose(0, 2, 1).reshape(-1, 3).astype(np.float64)


def test_moments_are_those_of_all_rows(model: ir.Model) -> None:
    ((found),) = collect_moments(model, {"transpose1": 3, "gelu4": 6}, BATCHES, threads=1)
    x = rows()
    moments = found["transpose1"]
    assert moments.rows == len(x) == 160
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(moments.second_moment, x.T @ x / len(x), rtol=1e-6)
    np.testing.assert_allclose(
        moments.covariance, np.cov(x, rowvar=False, bias=True), rtol=1e-4, atol=1e-5
    )
    assert found["gelu4"].scatter.shape == (6, 6)


def test_the_batches_do_not_matter(model: ir.Model) -> None:
    (one,) = collect_moments(model, {"gelu4": 6}, BATCHES, threads=1)
    (other,) = collect_moments(model, {"gelu4": 6}, [IMAGES], threads=1)
    np.testing.assert_allclose(one["gelu4"].mean, other["gelu4"].mean, rtol=1e-5)
    np.testing.assert_allclose(one["gelu4"].scatter, other["gelu4"].scatter, rtol=1e-3, atol=1e-3)


def test_groups_keep_to_the_limit(model: ir.Model) -> None:
    wanted = {"transpose1": 3, "gelu4": 6}
    seen: list[int] = []
    found = list(
        collect_moments(
            model, wanted, BATCHES, limit=8 * 36, threads=1, progress=lambda: seen.append
        )
    )
    assert [list(group) for group in found] == [["transpose1"], ["gelu4"]]
    assert seen == [4, 4, 2] * 2
    (whole,) = collect_moments(model, wanted, BATCHES, threads=1)
    np.testing.assert_allclose(found[1]["gelu4"].scatter, whole["gelu4"].scatter, rtol=1e-6)


def test_what_is_a_group() -> None:
    sizes = {"a": 2, "b": 2, "c": 10, "d": 1}
    assert groups(sizes, 64) == [{"a": 2, "b": 2}, {"c": 10}, {"d": 1}]
    assert groups(sizes, 10_000) == [sizes]
    assert groups({}, 64) == []


def test_no_rows_are_no_change() -> None:
    moments = Moments.empty(2)
    moments.update(np.full(2, np.nan, np.float32), np.zeros((2, 2), np.float32), 0)
    assert moments.rows == 0
    assert not moments.covariance.any()


def test_what_is_not_finite_is_named(model: ir.Model) -> None:
    broken = IMAGES.copy()
    broken[9, 0, 0, 0] = np.nan
    with pytest.raises(ModelError, match="'transpose1' are NaN or infinite"):
        list(collect_moments(model, {"transpose1": 3}, [broken], threads=1))


def test_rows_count_as_their_positions_do(model: ir.Model) -> None:
    """E[w x] and E[w (x - m)ᵀ(x - m)] in float64; a tensor of another shape is left as it is."""
    counts = np.random.default_rng(4).uniform(0, 3, 16)
    counts /= counts.mean()
    given = {"transpose1": counts, "gelu4": np.ones(5)}
    wanted = {"transpose1": 3, "gelu4": 6}
    (found,) = collect_moments(model, wanted, BATCHES, counts=given, threads=1)
    x, w = rows(), np.tile(counts, 10)
    mean = w @ x / 160
    np.testing.assert_allclose(found["transpose1"].mean, mean, rtol=1e-5)
    off = x - mean
    np.testing.assert_allclose(
        found["transpose1"].covariance, (off * w[:, None]).T @ off / 160, rtol=1e-4, atol=1e-5
    )
    (plain,) = collect_moments(model, wanted, BATCHES, threads=1)
    np.testing.assert_array_equal(found["gelu4"].scatter, plain["gelu4"].scatter)


def test_256_mb_hold_the_moments_of_twice_4096_channels() -> None:
    """8 bytes a number."""
    assert groups({"a": 4096, "b": 4096}) == [{"a": 4096, "b": 4096}]
    assert groups({"a": 4096, "b": 4097}) == [{"a": 4096}, {"b": 4097}]
