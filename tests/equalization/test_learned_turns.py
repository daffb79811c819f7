"""Learned turns: costs and rows are those of the model, and it computes the same as before."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from small_graph import SmallGraph, run, sample
from small_transformer import Choices, transformer

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization import learned_turns
from ptq_onnx.equalization.learned_turns import IMAGES, REST, Learned, learn_turns
from ptq_onnx.equalization.rotation_choice import LEARNED, Codes, turn_as, turn_streams
from ptq_onnx.equalization.streams import find_streams
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.pipeline.rotation_notes import notes_on

D, SIDE = 16, 8
BATCHES = [sample(8, 3, SIDE, SIDE, seed=s) for s in range(17)]
CODES = Codes(16, symmetric=False, of_stream=False)


def network(op: str = "Relu") -> ir.Model:
    """Patches [batch, 16, 16], an MLP behind a norm, a norm and a head on the mean; one channel of
    the stream is large, and its γ are small."""
    g = SmallGraph(("batch", 3, SIDE, SIDE))
    large, small = np.ones(D, np.float32), np.ones(D, np.float32)
    large[5], small[5] = 12, 0.05

    def linear(x: str, rows: int, columns: int, seed: int) -> str:
        product = g("MatMul", x, sample(rows, columns, seed=seed) * rows**-0.5)
        return g("Add", product, sample(columns, seed=seed + 9) * 0.1)

    patches = g("Conv", "x", sample(D, 3, 2, 2) * large.reshape(-1, 1, 1, 1), strides=[2, 2])
    flat = g("Reshape", patches, np.array([0, D, 16]))
    x = g("Transpose", flat, perm=[0, 2, 1])
    y = g("LayerNormalization", x, small, sample(D, seed=3) * 0.1, axis=-1)
    x = g("Add", x, linear(g(op, linear(y, D, 2 * D, 20)), 2 * D, D, 40))
    y = g("LayerNormalization", x, small, sample(D, seed=4) * 0.1, axis=-1)
    model = g.model(linear(g("ReduceMean", y, np.array([1]), keepdims=0), D, 5, 60))
    fuse(model)
    return model


def test_a_learned_turn_computes_the_same_and_says_what_it_saves() -> None:
    model = network()
    before = run(model, BATCHES[0])[0]
    told: list[int] = []
    learned = learn_turns(model, BATCHES, told.append)
    assert sum(told) == IMAGES + REST
    assert learned.note is None
    assert list(learned.matrices) == [0]
    matrix = learned.matrices[0]
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(D), atol=1e-12)
    np.testing.assert_allclose(matrix.sum(axis=1), np.ones(D), atol=1e-12)
    found = turn_streams(model, BATCHES, CODES, learned=learned, threads=1)
    (one,) = found.turned
    assert one.by == LEARNED
    assert one.loss_db == learned.saved[0] > 0.1
    np.testing.assert_array_equal(found.matrices[0], matrix)
    np.testing.assert_allclose(run(model, BATCHES[0])[0], before, atol=1e-4 * np.abs(before).max())
    assert turn_as(network(), [one]) is None, "no report has the matrix"


def test_costs_are_those_of_what_the_norm_makes_without_its_factors() -> None:
    """With y = γ x + β a slope of one by y is γ by x: at 16 positions g gᵀ adds up to 16 γ γᵀ."""
    model = network()
    stream = find_streams(model.graph)[0][0]
    read = learned_turns._Read(stream)
    last = list(read.made)[-1]
    width = len(read.scale[last])
    ones = torch.ones(1, 16, width)
    found = {name: torch.randn(1, 16, D) for pair in read.made.items() for name in pair}
    read.add(found, dict.fromkeys(read.made, ones))
    expected = 16 * np.outer(read.scale[last], read.scale[last])
    np.testing.assert_allclose(read.costs[0][-1], expected, rtol=1e-6)
    rows = read.rows[0][0]
    assert rows.shape == (2, learned_turns.ROWS, D)
    np.testing.assert_allclose(rows.mean(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose((rows**2).mean(axis=-1), 1, rtol=1e-5)


def test_none_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_turns, "ENOUGH", 0.0)
    assert learn_turns(network(), BATCHES) == Learned()


def test_none_from_fewer_images_than_are_held_apart() -> None:
    assert learn_turns(network(), [BATCHES[0][:7]]).matrices == {}


def test_an_op_without_a_gradient_is_named() -> None:
    found = learn_turns(network("Selu"), BATCHES)
    assert found.matrices == {}
    assert found.note is not None
    assert found.note.startswith("Rotation: the matrix is drawn, not learned; ")
    assert "no Selu in torch" in found.note


def test_a_model_without_a_stream_has_nothing_to_learn() -> None:
    assert learn_turns(transformer(Choices()), [sample(4, 6, 8)]) == Learned()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"quantizer": "lowbit", "bits": "4/4/4"}, True),
        ({"quantizer": "lowbit", "bits": "4/8/8"}, False),
        ({"quantizer": "lowbit", "bits": "4/8/8", "rotate": True}, False),
        ({"quantizer": "lowbit", "bits": "4/4/4", "rotate": False}, False),
        ({"quantizer": "fqvit"}, False),
    ],
)
def test_for_ranges_of_channels_alone(options: dict[str, object], expected: bool) -> None:
    assert QuantizeConfig(**options).learns_turns is expected  # type: ignore[arg-type]


def test_the_note_says_what_was_learned() -> None:
    model = network()
    learned = learn_turns(model, BATCHES)
    (note,) = notes_on(turn_streams(model, BATCHES, CODES, learned=learned, threads=1))
    assert note.endswith(
        "2 tensors, was turned by a matrix learned from gradients of the output: what rounding"
        f" behind norms costs it is expected to fall by {learned.saved[0]:.1f} dB, on images held"
        " apart."
    )
