"""Streams are found whole, turned exactly, or refused with the reason."""

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run, sample
from small_transformer import Choices, transformer

from ptq_onnx.equalization.rotation import turn
from ptq_onnx.equalization.rotation_choice import PLAIN, Codes, turn_again, turn_streams
from ptq_onnx.equalization.streams import find_streams
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.rotations import flattened, spreading

D = 8


def image_network(*, merge: bool = False, opened: bool = False, post: str = "") -> ir.Model:
    """image [batch, 3, 8, 8] → patches and a class token → MLP with LayerScale → head.

    ``merge``: four tokens are joined to 4 D channels before the last norm. ``opened``: that norm's
    output is an output. ``post``: an op between the stream and the last norm.
    """
    g = SmallGraph(("batch", 3, 8, 8))
    patches = g("Conv", "x", sample(D, 3, 4, 4, seed=1), sample(D, seed=2), strides=[4, 4])
    rows = g("Transpose", g("Reshape", patches, np.array([0, D, 4])), perm=[0, 2, 1])
    tokens = g("Concat", rows, rows, axis=1)
    x = g("Add", tokens, sample(1, 8, D, seed=3))
    n = g("LayerNormalization", x, sample(D, seed=4), sample(D, seed=5), axis=-1)
    h = g("Add", g("MatMul", n, sample(D, 16, seed=6)), sample(16, seed=7))
    h = g("Gelu", h)
    h = g("Add", g("MatMul", h, sample(16, D, seed=8)), sample(D, seed=9))
    x = g("Add", x, g("Mul", h, sample(D, seed=10)))
    width = D
    if merge:
        parts = [
            g("Slice", x, np.array([k]), np.array([8]), np.array([1]), np.array([4]))
            for k in range(4)
        ]
        x, width = g("Concat", *parts, axis=-1), 4 * D
    if post:
        x = g(post, x, sample(D, seed=13)) if post == "Mul" else g(post, x)
    n = g("LayerNormalization", x, sample(width, seed=11), sample(width, seed=12), axis=-1)
    out = g("Add", g("MatMul", n, sample(width, 5, seed=14)), sample(5, seed=15))
    model = g.model(*([out, n] if opened else [out]))
    fuse(model)
    return model


def images(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("merge", [False, True])
def test_turned_networks_compute_the_same(merge: bool) -> None:
    model = image_network(merge=merge)
    before = run(model, images())[0]
    (stream,), refused = find_streams(model.graph)
    assert not refused
    assert (stream.width, len(stream.norms), len(stream.readers)) == (D, 2, 2)
    assert (len(stream.writers), len(stream.scaled), len(stream.constants)) == (1, 1, 1)
    matrix = flattened(spreading(D, 0), sample(D, seed=20).astype(np.float64))
    turn(model.graph, stream, matrix)
    after = run(model, images())[0]
    np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())
    for norm in stream.norms:
        assert np.array_equal(constant(norm.inputs[1]), np.ones_like(constant(norm.inputs[1])))
        assert not np.any(constant(norm.inputs[2]))
    assert all(node.op_type != "Mul" for node in model.graph), "LayerScale is in a weight"


@pytest.mark.parametrize("choices", [Choices(), Choices(packed=False, pool=True)])
def test_the_input_is_no_stream(choices: Choices) -> None:
    """Tokens that come from outside cannot be turned; nothing is changed."""
    model = transformer(choices)
    streams, refused = find_streams(model.graph)
    assert not streams
    assert [r.reason for r in refused] == ["'x' is an input of the model"]


def test_a_turned_tensor_is_the_old_one_times_r() -> None:
    model = image_network()
    (stream,), _ = find_streams(model.graph)
    name = str(stream.norms[1].inputs[0].name)
    tapped = model.clone()
    value = next(v for n in tapped.graph for v in n.outputs if v.name == name)
    tapped.graph.outputs.append(value)
    before = run(tapped, images())[1]
    matrix = spreading(D, 1)
    turn(model.graph, stream, matrix)
    value = next(v for n in model.graph for v in n.outputs if v.name == name)
    model.graph.outputs.append(value)
    np.testing.assert_allclose(run(model, images())[1], before @ matrix, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"opened": True}, "is an output"),
        ({"post": "Relu"}, "(Relu) reads it"),
        ({"post": "Mul"}, "multiplies each channel by another factor"),
    ],
)
def test_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    model = image_network(**change)  # type: ignore[arg-type]
    streams, refused = find_streams(model.graph)
    assert not streams
    assert reason in refused[0].reason


def test_a_norm_with_other_factors_for_each_token_is_refused() -> None:
    model = image_network()
    (stream,), _ = find_streams(model.graph)
    scale = stream.norms[1].inputs[1]
    assert scale is not None
    scale.const_value = ir.tensor(sample(8, D, seed=30), name=scale.name)
    streams, refused = find_streams(model.graph)
    assert not streams
    assert "is not a constant for each channel" in refused[0].reason


def massive(model: ir.Model) -> ir.Model:
    """One channel of the stream a hundred times as large as the others."""
    for node in model.graph:
        weight = constant(node.inputs[1]) if node.op_type == "Conv" else None
        if weight is not None:
            new = weight.copy()
            new[3] *= 100
            node.inputs[1].const_value = ir.tensor(new, name=node.inputs[1].name)
    return model


def test_a_massive_channel_is_turned_away() -> None:
    model = massive(image_network())
    before = run(model, images())[0]
    again = model.clone()
    found = turn_streams(
        model, [images(k) for k in range(4)], Codes(256, symmetric=False), threads=1
    )
    (one,) = found.turned
    assert one.by != PLAIN
    assert one.stream_db > 3
    assert one.largest_after < 0.7 * one.largest_before
    np.testing.assert_allclose(run(model, images())[0], before, atol=1e-4 * np.abs(before).max())
    turn_again(again, found.matrices)
    np.testing.assert_array_equal(run(again, images())[0], run(model, images())[0])


def test_the_range_covers_what_it_says() -> None:
    """Ranges are parts of what the turned tensors hold, zero inside, and never wider."""
    model = massive(image_network())
    found = turn_streams(
        model, [images(k) for k in range(4)], Codes(256, symmetric=False), threads=1
    )
    for name, (low, high) in found.ranges.items():
        tapped = model.clone()
        value = next(v for n in tapped.graph for v in n.outputs if v.name == name)
        tapped.graph.outputs.append(value)
        seen = np.concatenate([run(tapped, images(k))[1] for k in range(4)])
        assert low <= 0 <= high
        assert 0.29 * seen.min() >= low >= seen.min() * 1.001
        assert 0.29 * seen.max() <= high <= seen.max() * 1.001


def test_codes_of_more_bits_clip_less() -> None:
    """Each range is searched for the codes that its tensor has."""
    names = [str(n.inputs[0].name) for n in massive(image_network()).graph if "Norm" in n.op_type]
    batches = [images(k) for k in range(4)]
    narrow, wide = (
        turn_streams(
            massive(image_network()),
            batches,
            Codes(16, symmetric=False, levels_of=dict.fromkeys(names, levels)),
            threads=1,
        )
        for levels in (16, 65536)
    )
    spans = [[high - low for low, high in found.ranges.values()] for found in (narrow, wide)]
    assert len(spans[0]) == len(spans[1]) == 2
    assert sum(spans[0]) < 0.9 * sum(spans[1])
