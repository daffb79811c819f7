"""Weights and biases of convolutions on codes, from what they read in integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run, sample
from test_code_regions import BATCHES, SIDE, WIDE, fused, mobile, quantized

from ptq_onnx.blocks import region_costs
from ptq_onnx.blocks.regions import TIE, _Finder
from ptq_onnx.graph.expansions import standardise
from ptq_onnx.numerics.grain import PerChannel
from ptq_onnx.numerics.rounding import loss, nearest
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers import convolution_weights
from ptq_onnx.quantizers.convolution_walk import as_inputs
from ptq_onnx.quantizers.convolution_weights import (
    DAMPING,
    may_round,
    moments_of,
    refitted,
    rounded_weight,
)
from ptq_onnx.runtime.packed import pack


@pytest.fixture(scope="module")
def network() -> ir.Model:
    g = SmallGraph(("batch", WIDE, SIDE, SIDE))
    return fused([mobile(g)], g)


def test_means_stay_those_of_the_float_model(
    network: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last of seven convolutions, behind clipping, two gates and a rounded constant; what is
    left is what its own codes round."""
    monkeypatch.setitem(region_costs.CODES, "HardSwish", 0.0)  # the gates are on codes
    expected, noise = np.concatenate([run(network, x)[0] for x in BATCHES]), {}
    for corrects in (True, False):
        made = quantized(network, bias_correction=corrects)
        file = standardise(lower(made.model, made.specs))
        found = np.concatenate([run(file, x)[0] for x in BATCHES])
        error = (found - expected).astype(np.float64)
        noise[corrects] = np.square(error.mean(axis=(0, 2, 3))).mean(), np.square(error).mean()
    assert noise[True][0] < 0.1 * noise[False][0]
    assert noise[True][1] < 0.9 * noise[False][1]


def test_moments_are_of_what_lies_under_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    g = SmallGraph(("batch", 3, 7, 6))
    weight = sample(4, 3, 3, 2, seed=1)
    model = g.model(g("Conv", "x", weight, pads=[1, 0, 0, 1], strides=[2, 1]))
    node = next(n for n in model.graph if n.op_type == "Conv")
    batches = [sample(2, 3, 7, 6, seed=s) for s in (2, 3)]
    rows = []
    for x in np.pad(np.concatenate(batches), ((0, 0), (0, 0), (1, 0), (0, 1))):
        for i in range(0, 6, 2):
            rows += [x[:, i : i + 3, j : j + 2].ravel() for j in range(6)]
    found, count = moments_of(node, weight.shape, batches)
    assert count == len(rows) == 4 * 3 * 6
    np.testing.assert_allclose(found, np.array(rows).T @ np.array(rows) / count, 1e-5, 1e-6)
    made = run(model, batches[0])[0]
    np.testing.assert_allclose(np.array(rows[:18]) @ weight.reshape(4, -1).T,
                               made[0].reshape(4, -1).T, rtol=1e-4, atol=1e-5)  # fmt: skip
    monkeypatch.setattr(convolution_weights, "ROWS", 4 * 9)
    few, count = moments_of(node, weight.shape, batches)
    assert count == 4 * 9
    picked = np.array(rows).reshape(4, 18, -1)[:, ::2].reshape(36, -1)
    np.testing.assert_allclose(few, picked.T @ picked / 36, 1e-5, 1e-6)


def test_several_inputs_have_a_stream_each() -> None:
    image, number = (ir.Value(name=n, type=ir.TensorType(t)) for n, t in (
        ("image", ir.DataType.FLOAT), ("number", ir.DataType.INT64)))  # fmt: skip
    graph = ir.Graph([image, number], [], nodes=[], opset_imports={"": 21})
    images = sample(2, 3, 4, 4, seed=1)
    packed = np.stack([pack([one, np.array([7 + i])]) for i, one in enumerate(images)])
    found = as_inputs(graph, [packed, packed[:1]])
    assert [batch.tolist() for batch in found["number"]] == [[[7], [8]], [[7]]]
    assert found["number"][0].dtype == np.int64
    np.testing.assert_array_equal(found["image"][0], images)
    graph.inputs[:] = [image]
    np.testing.assert_array_equal(as_inputs(graph, [images])["image"][0], images)


def convolution(**attributes: object) -> tuple[ir.Node, np.ndarray, TensorSpec]:
    g = SmallGraph(("batch", 16, 6, 6))
    inside = 16 // int(attributes.get("group", 1))  # type: ignore[call-overload]
    weight = sample(16, inside, 3, 3, seed=4)
    model = g.model(g("Conv", "x", weight, pads=[2] * 4, **attributes))
    scale = np.abs(weight).max(axis=(1, 2, 3)) / 127
    spec = TensorSpec("w", Rule(8, True, True, PerChannel()), scale, np.zeros(16, np.int32), axis=0)
    return next(n for n in model.graph if n.op_type == "Conv"), weight, spec


def test_weights_are_rounded_for_what_is_read() -> None:
    """Channels that are alike: their errors can cancel."""
    node, weight, spec = convolution()
    alike = sample(4, 1, 6, 6, seed=5) + 0.05 * sample(4, 16, 6, 6, seed=6) + 1
    moments, pixels = moments_of(node, weight.shape, [alike])
    new = rounded_weight(weight, spec, moments, pixels)
    assert new is not None
    scale = np.asarray(spec.scale).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(new / scale, np.rint(new / scale), atol=1e-4)
    flat, steps = weight.reshape(16, -1).T, np.asarray(spec.scale)
    codes = np.rint(new / scale).astype(np.int8).reshape(16, -1).T
    before = loss(flat, steps, moments, nearest(flat, steps, 8)).sum()
    assert loss(flat, steps, moments, codes).sum() < before / 10


def test_a_weight_fits_what_is_read_in_integers() -> None:
    """Against the least squares of the stacked rows, in float64: an error that all pixels share is
    taken out, and one that each has for itself leaves the weight (all but) alone."""
    node, weight, _ = convolution()
    x = sample(4, 16, 12, 12, seed=7) + sample(1, 16, 1, 1, seed=8)
    alike = x + 0.1 * sample(1, 16, 1, 1, seed=9)
    moments, _ = moments_of(node, weight.shape, [alike])
    new = refitted(node, weight, [x[:2], x[2:]], [alike[:2], alike[2:]], moments)
    rows, read = (
        np.moveaxis(np.lib.stride_tricks.sliding_window_view(
            np.pad(of, ((0, 0), (0, 0), (2, 2), (2, 2))), (3, 3), axis=(2, 3)), 1, 3,
        ).reshape(-1, 16 * 9).astype(np.float64)
        for of in (x, alike)
    )  # fmt: skip
    flat = weight.reshape(len(weight), -1).T.astype(np.float64)
    held = np.sqrt(DAMPING * np.square(read).sum() / read.shape[1]) * np.eye(read.shape[1])
    expected, *_ = np.linalg.lstsq(
        np.concatenate([read, held]), np.concatenate([rows @ flat, held @ flat]), rcond=None
    )
    np.testing.assert_allclose(new.reshape(len(new), -1).T, expected, rtol=1e-3, atol=1e-4)
    noise = [np.square(rows @ flat - read @ w).sum() for w in (flat, new.reshape(len(new), -1).T)]
    assert noise[1] < 0.1 * noise[0]
    single = x + 0.01 * sample(*x.shape, seed=10)
    moments, _ = moments_of(node, weight.shape, [single])
    change = refitted(node, weight, [x], [single], moments) - weight
    assert np.linalg.norm(change) < 0.01 * np.linalg.norm(weight)


@pytest.mark.parametrize("near", [{"group": 16}, {"group": 2}, {"dilations": [2, 2]}, "wide"])
def test_others_keep_the_nearest(near: object, monkeypatch: pytest.MonkeyPatch) -> None:
    if near == "wide":
        monkeypatch.setattr(convolution_weights, "WIDEST", 16 * 9 - 1)
    node, *_ = convolution(**(near if isinstance(near, dict) else {}))
    assert not may_round(node)


@pytest.mark.parametrize(("more", "left"), [(0.5 * TIE, 1), (2 * TIE, 2)])
def test_at_a_tie_the_first_convolutions_are_in_integers(
    network: ir.Model, more: float, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = _Finder(network.graph, frozenset())
    convolutions = [n for n in finder.nodes if n.op_type == "Conv"]
    times = dict(zip(range(8), (120, 100 * (1 + more), 100, *[110] * 5), strict=True))
    monkeypatch.setattr(finder, "cost", lambda kept: times[len(convolutions) - len(kept)])
    assert finder._beginnings(set(convolutions)) == [set(convolutions[:left])]
