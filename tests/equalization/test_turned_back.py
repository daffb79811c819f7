"""Streams with something that cannot take the matrix in: turned back there, and counted."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run, sample, text

from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.equalization.rotation import turn
from ptq_onnx.equalization.rotation_choice import (
    FLATTENED,
    PLAIN,
    SPREAD,
    Codes,
    Turned,
    turn_again,
    turn_as,
    turn_streams,
)
from ptq_onnx.equalization.stream_parts import Stream
from ptq_onnx.equalization.streams import find_streams
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.rotations import flattened, spreading

D, HIDDEN = 8, 128


def network(
    tail: str, *, pre: bool = False, shift: float = 0.3, hidden: int = HIDDEN, branch: str = ""
) -> ir.Model:
    """image [batch, 3, 8, 8] → 4 patches → (norm) → MLP → norm → ``tail``.

    ``tail``: what reads the last norm, beside a linear. ``shift``: the size of its β. ``branch``:
    an op behind the MLP.
    """
    g = SmallGraph(("batch", 3, 8, 8))
    patches = g("Conv", "x", sample(D, 3, 4, 4, seed=1), sample(D, seed=2), strides=[4, 4])
    rows = g("Transpose", g("Reshape", patches, np.array([0, D, 4])), perm=[0, 2, 1])
    x = g("Add", rows, sample(1, 4, D, seed=3))
    if pre:
        x = g("LayerNormalization", x, sample(D, seed=16), sample(D, seed=17), axis=-1)
    n = g("LayerNormalization", x, sample(D, seed=4), sample(D, seed=5), axis=-1)
    h = g("Gelu", g("Add", g("MatMul", n, sample(D, hidden, seed=6)), sample(hidden, seed=7)))
    h = g("Add", g("MatMul", h, sample(hidden, D, seed=8)), sample(D, seed=9))
    x = g("Add", x, g(branch, h) if branch else h)
    scale = 1 + 0.5 * np.abs(sample(D, seed=11))
    n = g("LayerNormalization", x, scale, shift * sample(D, seed=12), axis=-1)
    out = g("Add", g("MatMul", n, sample(D, 5, seed=14)), sample(5, seed=15))
    image = g("Reshape", g("Transpose", n, perm=[0, 2, 1]), np.array([0, D, 2, 2]))
    if tail == "output":
        outputs = [out, n]
    elif tail == "stream":
        outputs = [out, x]
    elif tail == "relu":
        outputs = [out, g("Relu", n)]
    elif tail == "conv":
        outputs = [out, g("Conv", image, sample(4, D, 2, 2, seed=18), sample(4, seed=19))]
    elif tail == "padded conv":
        outputs = [out, g("Conv", image, sample(4, D, 3, 3, seed=18), pads=[1, 1, 1, 1])]
    elif tail == "transposed conv":
        w = sample(D, 4, 2, 2, seed=18)
        outputs = [out, g("ConvTranspose", image, w, sample(4, seed=19), strides=[2, 2])]
    elif tail in ("zeros", "ones"):
        padded = g("Pad", n, np.array([0, 1, 0, 0, 0, 0]), float(tail == "ones"))
        outputs = [out, g("Add", g("MatMul", padded, sample(D, 3, seed=20)), sample(3, seed=21))]
    elif tail == "joined":
        others = g("Conv", "x", sample(D, 3, 4, 4, seed=22), strides=[4, 4])
        others = g("Transpose", g("Reshape", others, np.array([0, D, 4])), perm=[0, 2, 1])
        both = g("Concat", n, others, axis=1)
        outputs = [out, g("Add", g("MatMul", both, sample(D, 3, seed=20)), sample(3, seed=21))]
    else:
        outputs = [out]
    model = g.model(*outputs)
    fuse(model)
    return model


def images(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 3, 8, 8)).astype(np.float32)


def turned(model: ir.Model) -> Stream:
    """The one stream, turned; every output, and its name, stays."""
    names = [v.name for v in model.graph.outputs]
    before = run(model, images())
    (stream,), refused = find_streams(model.graph)
    assert not refused
    linears = sum(map(is_linear, model.graph))
    added = turn(model.graph, stream, spreading(D, 1))
    assert sum(map(is_linear, model.graph)) == linears + len(added)
    assert len(added) == len(stream.products)
    assert [v.name for v in model.graph.outputs] == names
    for old, new in zip(before, run(model, images()), strict=True):
        np.testing.assert_allclose(new, old, atol=2e-5 * np.abs(old).max())
    return stream


@pytest.mark.parametrize(
    ("tail", "products", "shifted"),
    [
        ("none", 0, 0),
        ("output", 1, 0),
        ("stream", 1, 0),
        ("relu", 1, 0),
        ("conv", 0, 0),
        ("padded conv", 0, 1),
        ("transposed conv", 0, 1),
        ("zeros", 0, 1),
        ("ones", 1, 0),
        ("joined", 1, 0),
    ],
)
def test_what_is_turned_back(tail: str, products: int, shifted: int) -> None:
    stream = turned(network(tail))
    assert (len(stream.products), len(stream.shifted)) == (products, shifted)
    assert stream.added == pytest.approx(products * 256 / own(tail), rel=1e-6)


def own(tail: str) -> int:
    """Multiplications: patches, two linears of the MLP, the head, and what reads the norm."""
    more = {
        "conv": 4 * 32, "padded conv": 4 * 4 * 72, "transposed conv": 4 * 16 * 32,
        "zeros": 5 * 3 * 8,
    }  # fmt: skip
    return 32 * 48 + 2 * 4 * D * HIDDEN + 20 * 8 + more.get(tail, 0)


def test_a_large_shift_is_no_part_of_a_norm() -> None:
    """β/γ is larger than what the norm makes: zeros are padded behind a product instead."""
    stream = turned(network("zeros", shift=30.0))
    assert (len(stream.products), len(stream.shifted)) == (1, 0)


def test_without_a_shift_zeros_stay_zeros() -> None:
    stream = turned(network("zeros", shift=0.0))
    assert (len(stream.products), len(stream.shifted)) == (0, 0)


def test_a_norm_in_front_of_the_stream() -> None:
    """CLIP's: γ and β stay, one product turns what it makes."""
    model = network("none", pre=True)
    (stream,), refused = find_streams(model.graph)
    assert [len(stream.products), len(stream.entered)] == [1, 1]
    assert "reads the norm" in refused[0].reason
    before = run(model, images())[0]
    norms = [n for n in model.graph if n.op_type == "LayerNormalization"]
    scale = constant(norms[0].inputs[1])
    turn(model.graph, stream, spreading(D, 2))
    np.testing.assert_allclose(run(model, images())[0], before, atol=2e-5 * np.abs(before).max())
    assert np.array_equal(constant(norms[0].inputs[1]), scale)


def test_what_another_op_adds_to_the_stream_is_turned() -> None:
    """A product behind it; what it reads is no part of the stream."""
    model = network("none", branch="Relu")
    (maker,) = [n for n in model.graph if n.op_type == "Relu"]
    stream = turned(model)
    assert [len(stream.products), list(stream.entered)] == [1, [maker.outputs[0]]]
    read = maker.inputs[0]
    assert read not in stream.axes
    assert read.producer() not in stream.writers  # type: ignore[union-attr]


def test_products_that_would_cost_too_much_are_not_added() -> None:
    streams, refused = find_streams(network("relu", hidden=16).graph)
    assert not streams
    assert "(Relu) reads the norm" in refused[0].reason
    assert "(1) would add 9% to its own, more than 5%" in refused[0].reason


def massive(tail: str) -> ir.Model:
    model = network(tail)
    conv = next(n for n in model.graph if n.op_type == "Conv")
    weight = np.array(constant(conv.inputs[1]))
    weight[3] *= 100
    conv.inputs[1].const_value = ir.tensor(weight, name=conv.inputs[1].name)
    return model


def test_ranges_bear_the_names_that_tensors_have_then() -> None:
    """The stream is an output: what norms read has another name once it is turned."""
    model = massive("stream")
    again = model.clone()
    batches = [images(k) for k in range(4)]
    found = turn_streams(model, batches, Codes(256, symmetric=False), threads=1)
    (one,) = found.turned
    assert one.by != PLAIN
    assert (one.products, len(found.added)) == (1, 1)
    read = {str(n.inputs[0].name) for n in model.graph if n.op_type == "LayerNormalization"}
    assert set(found.ranges) == read
    turn_again(again, found.matrices)
    for old, new in zip(run(model, images()), run(again, images()), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_product_is_added_for_a_gain_alone() -> None:
    """What norms make is spread a little; that is not worth a product."""
    codes = Codes(256, symmetric=False, of_stream=False)
    batches = [images(k) for k in range(4)]
    (free,) = turn_streams(network("none"), batches, codes, threads=1).turned
    (paid,) = turn_streams(network("output"), batches, codes, threads=1).turned
    assert free.by != PLAIN
    assert paid.by == PLAIN
    assert paid.products == 0


def test_an_earlier_run_s_matrices_are_checked() -> None:
    """Any seed from 0 on, a direction of the width and of numbers; else nothing is done."""
    model = network("")
    before = text(model)
    (stream,), _ = find_streams(model.graph)
    one = Turned(str(stream.norms[0].name), D, 2, SPREAD, 0, 1.0, 1.0, 0.0, 0.0)
    flat = replace(one, by=FLATTENED, direction=tuple(np.arange(D) - 3.5))
    for wrong in (
        replace(one, seed=-1),
        replace(one, stream="other"),
        replace(one, width=D + 1),
        replace(flat, direction=flat.direction[1:]),
        replace(flat, direction=(*flat.direction[1:], np.nan)),
    ):
        assert turn_as(model, [wrong]) is None
        assert turn_as(model, [one, wrong]) is None
        assert text(model) == before
    for right in (one, flat, replace(one, seed=3)):
        found = turn_as(network(""), [right])
        assert found is not None
        (matrix,) = found.matrices
        assert matrix is not None
        expected = spreading(D, right.seed)
        if right.by == FLATTENED:
            expected = flattened(expected, np.array(right.direction))
        np.testing.assert_array_equal(matrix, expected)
