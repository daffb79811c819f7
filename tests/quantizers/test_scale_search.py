"""The search of scales: against a loop over candidates, and through all quantizers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from prepared_models import quantized
from small_graph import run, sample
from small_transformer import Choices, transformer

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.calibration.pearson import correlation
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.fake_quantize import dequantize, quantize
from ptq_onnx.numerics.grain import PerChannel
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.preparation.model_files import to_standard
from ptq_onnx.quantizers import scale_search as search
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer
from ptq_onnx.quantizers.scale_search import Operand, Product

IMAGES = sample(12, 6, 8, seed=3)


def small(**options: Any) -> SiteQuantizer:
    """A small transformer, calibrated."""
    model = transformer(Choices(packed=False), blocks=1)
    blocks = find_blocks(model)
    config = QuantizeConfig(threads=1, **options)
    quantizer = make_quantizer(Plan(model, blocks, find_sites(model, blocks), config))
    quantizer.run(torch.zeros(1, 6, 8), [IMAGES[:8], IMAGES[8:]])
    return quantizer


def spec(scale: float, zero: int = 0, **rule: Any) -> TensorSpec:
    return TensorSpec("x", Rule(**rule), np.array(scale, np.float32), np.array(zero, np.int32))


RULES = [
    spec(0.1, bits=4),
    spec(0.2, 3, bits=4, signed=False, symmetric=False),
    spec(0.1, bits=4, grain=PerChannel()).with_factor(np.linspace(0.5, 2, 6, dtype=np.float32)),
]


@pytest.mark.parametrize("kind", RULES)
def test_rounded_is_the_quantizer_with_another_scale(kind: TensorSpec) -> None:
    value = sample(7, 6, seed=5)
    shares = np.array([0.5, 1.0, 1.3])
    found = Operand("x", kind, value).rounded(shares)
    for share, array in zip(shares, found, strict=True):
        other = TensorSpec(
            "x", kind.rule, kind.scale * np.float32(share), kind.zero_point, factor=kind.factor
        )
        np.testing.assert_allclose(array, dequantize(quantize(value, other), other), rtol=1e-6)


def test_scores_are_those_of_each_candidate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = sample(40, 6, seed=1), sample(6, 5, seed=2)
    operands = Operand("x", RULES[0], x), Operand("w", spec(0.2, bits=3), w)
    product = Product(operands, x @ w, np.linspace(1, 3, 40))
    shares = np.linspace(0.5, 1.5, 9)
    for index in (0, 1):
        whole = product.scores(index, shares, 0.8, correlation)
        monkeypatch.setattr(search, "AT_ONCE", 4 * 40 * 5 * 2)
        np.testing.assert_allclose(product.scores(index, shares, 0.8, correlation), whole)
        for share, score in zip(shares, whole, strict=True):
            one = np.array([share if index == 0 else 0.8])
            two = np.array([share if index == 1 else 0.8])
            made = operands[0].rounded(one)[0] @ operands[1].rounded(two)[0]
            expected = correlation(x @ w, made[None], product.weight)[0]
            assert score == pytest.approx(expected, rel=1e-6)


def test_the_scale_of_a_linear_is_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """fc2's input and weight, by a loop over the candidates on all rows of all images."""
    monkeypatch.setattr(search, "ROUNDS", 1)
    plain = small(quantizer="deploy", method="minmax", bits="4/4/8", equalize=False)
    found = small(quantizer="deploy", method="pearson", bits="4/4/8", equalize=False)
    node = next(
        n
        for n in reversed(list(plain.model.graph))
        if plain.plan.blocks.roles[n.name].name == "fc2" and is_linear(n)
    )
    read, weight = str(node.inputs[0].name), str(node.inputs[1].name)
    model = plain.plan.model.clone()
    model.graph.outputs.append(next(v for n in model.graph for v in n.outputs if v.name == read))
    x = run(to_standard(model), IMAGES)[-1].reshape(-1, constant(node.inputs[1]).shape[0])
    w = constant(node.inputs[1])

    def rounded(array: np.ndarray, tensor: str, share: float) -> np.ndarray:
        old = plain.specs[tensor]
        new = TensorSpec(tensor, old.rule, old.scale * np.float32(share), old.zero_point, old.axis)
        return dequantize(quantize(array, new), new).astype(np.float64)

    def rho(a: float, b: float) -> float:
        o, c = (x.astype(np.float64) @ w).ravel(), rounded(x, read, a) @ rounded(w, weight, b)
        return float(np.corrcoef(o, c.ravel())[0, 1])

    candidates = np.linspace(search.LEAST, search.MOST, search.NUMBER)
    shares = {t: float(np.max(found.specs[t].scale / plain.specs[t].scale)) for t in (read, weight)}
    assert shares[read] != 1
    best = max(rho(a, 1.0) for a in candidates)
    assert rho(shares[read], 1.0) == pytest.approx(best, rel=1e-5)
    best = max(rho(shares[read], b) for b in candidates)
    assert rho(shares[read], shares[weight]) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("name", ["vanilla", "channelwise", "fqvit", "deploy"])
def test_every_quantizer_takes_it(name: str) -> None:
    """Scales move by one share per tensor, within bounds; zero points and factors do not; what
    no product reads has the range of the fall-back."""
    options = {"equalize": False} if name == "deploy" else {}
    found = quantized(quantizer=name, method="pearson", **options)
    plain = quantized(quantizer=name, method="minmax", **options)
    other = quantized(quantizer=name, method="robust", **options)
    moved = 0
    for tensor, spec in found.specs.items():
        site = found.plan.sites[tensor]
        read = [found.nodes[n].op_type in ("Linear", "MatMul", "Conv") for n in site.consumers]
        if (not site.is_parameter and not all(read)) or not read:
            expected = other.specs[tensor]
            assert spec.rule.method in ("robust", "fixed")
            np.testing.assert_array_equal(spec.scale, expected.scale)
            continue
        expected = plain.specs[tensor]
        share = spec.scale / expected.scale
        assert np.ptp(share) < 1e-5
        assert search.LEAST - 1e-5 <= share.min() <= search.MOST + 1e-5
        np.testing.assert_array_equal(spec.zero_point, expected.zero_point)
        if expected.factor is not None:
            np.testing.assert_array_equal(spec.factor, expected.factor)
        moved += int(abs(share.max() - 1) > 1e-3)
    assert moved > 4


def test_ranking_is_pearson_but_for_the_factors_of_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ptq_onnx.calibration.ranking.WEIGHT", 50)
    found, plain = (
        small(quantizer="deploy", method=name, bits="4/4/8", equalize=False)
        for name in ("ranking", "pearson")
    )
    assert found.specs.keys() == plain.specs.keys()
    other = {
        found.plan.sites[tensor].role
        for tensor, spec in found.specs.items()
        if not np.array_equal(spec.scale, plain.specs[tensor].scale)
    }
    assert other
    assert other <= {"q", "k"}


def test_a_range_that_is_known_stays() -> None:
    """Attention maps of deploy are fixed; so is what equalisation has fixed."""
    quantizer = quantized(quantizer="deploy", method="pearson", target="tensorrt")
    for tensor, (low, high) in quantizer.plan.fixed.items():
        if tensor in quantizer.specs:
            step = (high - low) / 255
            assert float(quantizer.specs[tensor].scale) == pytest.approx(step, rel=1e-3)
    assert quantizer.plan.fixed


def test_of_equals_the_range_that_was_calibrated_stays() -> None:
    """The map of a single key is 1 everywhere: ρ does not see how far it is clipped."""
    weights, values = np.ones((1, 40, 1), np.float32), sample(1, 1, 6, seed=4)
    one = spec(1 / 255, bits=8, signed=False, symmetric=False)
    product = Product(
        (Operand("map", one, weights), Operand("v", None, values)), weights @ values, np.ones(40)
    )
    candidates = np.linspace(search.LEAST, search.MOST, search.NUMBER)
    candidates = candidates[np.argsort(np.abs(candidates - 1), kind="stable")]
    scores = product.scores(0, candidates, 1.0, correlation)
    assert candidates[search._first_good(scores)] == 1
    assert search._first_good(np.array([0.9, 0.99, 0.9899999, 0.98])) == 1
