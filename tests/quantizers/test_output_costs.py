"""What errors of linears cost: by the outputs' gradient, and nothing where there is none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, sample
from small_transformer import TOKENS, WIDTH, Choices, transformer

from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.numerics.two_sided import steadied
from ptq_onnx.quantizers import output_costs
from ptq_onnx.quantizers.output_costs import IMAGES, find_output_costs

X = np.random.default_rng(0).normal(size=(24, TOKENS, WIDTH)).astype(np.float32)


def names(model: ir.Model) -> list[str]:
    return [str(n.outputs[0].name) for n in model.graph if is_linear(n)]


def test_every_linear_but_the_last_has_costs() -> None:
    model, told = transformer(Choices()), [0]
    found = find_output_costs(model, [X[:10], X[10:]], told.append)
    assert sum(told) == len(X)
    assert found.note is None
    assert sorted(found.matrices) == sorted(names(model)[:-1])
    for matrix in found.matrices.values():
        np.testing.assert_allclose(matrix, matrix.T, rtol=1e-6)
        assert np.linalg.eigvalsh(matrix).min() > 0


def test_costs_are_the_output_weights_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """logits = (x A) B in two linears: g by x A is B e, e the slope of the logits: at a
    temperature of 1e6 each drawn class of four has e = (one-hot − 1/4)."""
    monkeypatch.setattr(output_costs, "SOFTNESS", 1e6)
    g = SmallGraph(("batch", 5))
    weights = [sample(5, 6), sample(6, 4, seed=1)]
    middle = g("Add", g("MatMul", "x", weights[0]), sample(6, seed=2))
    model = g.model(g("Add", g("MatMul", middle, weights[1]), sample(4, seed=3)))
    fuse(model)
    x = np.random.default_rng(1).normal(size=(4000, 5)).astype(np.float32)
    monkeypatch.setattr(output_costs, "IMAGES", len(x))
    (found,) = find_output_costs(model, [x]).matrices.values()
    b = weights[1].astype(np.float64)
    exact = len(x) * b @ (np.eye(4) / 4 - 1 / 16) @ b.T
    expected = steadied(exact, len(x))
    np.testing.assert_allclose(found, expected, atol=0.06 * np.abs(expected).max())


def test_the_widest_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_costs, "BYTES", 8 * WIDTH**2)
    found = find_output_costs(transformer(Choices()), [X])
    assert len(found.matrices) == 1
    assert found.note is not None
    assert found.note.endswith("wide linears are rounded by their own outputs alone.")


def test_without_a_gradient_there_is_a_note() -> None:
    g = SmallGraph(("batch", 5))
    model = g.model(g("MatMul", g("Selu", g("MatMul", "x", sample(5, 6))), sample(6, 4)))
    fuse(model)
    found = find_output_costs(model, [sample(8, 5)])
    assert found.matrices == {}
    assert found.note is not None
    assert "no Selu in torch" in found.note


@pytest.mark.parametrize(
    ("quantizer", "bits", "expected"),
    [
        ("lowbit", "4/8/8", True),
        ("lowbit", "3/8/8", True),
        ("lowbit", "4/4/4", False),
        ("lowbit", "6/8/8", False),
        ("deploy", "4/8/8", False),
    ],
)
def test_only_where_weights_alone_are_few_bits(quantizer: str, bits: str, expected: bool) -> None:
    assert IMAGES >= 64
    assert QuantizeConfig(quantizer=quantizer, bits=bits).rounds_by_output is expected
