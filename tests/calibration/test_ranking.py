"""The ranking loss against loops in float64, and which products are scored by it."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from small_transformer import Choices, transformer

from ptq_onnx.blocks.walking import is_product
from ptq_onnx.calibration import ranking
from ptq_onnx.calibration.pearson import correlation
from ptq_onnx.calibration.ranking import ranked_correlation, ranking_loss
from ptq_onnx.quantizers import scale_search


def by_hand(output: np.ndarray, candidate: np.ndarray, weight: np.ndarray) -> float:
    """The formula, pair by pair."""
    exact, found = output.astype(np.float64), candidate.astype(np.float64)
    keys, least = exact.shape[-1], ranking.THRESHOLD * exact.std()
    lost = [
        weight[r] * max(least - (found[u, r, i] - found[u, r, j]) * (-1) ** (o < 0), 0) * (o != 0)
        for u, r, i, s in product(*map(range, exact.shape), ranking.APART)
        if s % keys
        for j in [(i - s) % keys]
        for o in [exact[u, r, i] - exact[u, r, j]]
    ]
    count = len({s % keys for s in ranking.APART} - {0})
    return float(np.sum(lost) / (exact.std() * weight.sum() * len(exact) * keys * count))


def test_the_loss_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "APART", (1, 2, 4, 7))
    random = np.random.default_rng(0)
    output = random.normal(3, 2, (2, 4, 7)).astype(np.float32)
    output[0, 1, 3] = output[0, 1, 2]
    candidates = output + random.normal(0, 1, (3, *output.shape)).astype(np.float32)
    weight = np.array([1.0, 3, 1, 2])
    wanted = [by_hand(output, c, weight) for c in candidates]
    np.testing.assert_allclose(ranking_loss(output, candidates, weight), wanted, rtol=1e-5)
    scores = correlation(output, candidates, weight) - 0.5 * np.array(wanted)
    np.testing.assert_allclose(ranked_correlation(output, candidates, weight), scores, rtol=1e-5)


def test_order_counts_and_not_how_far() -> None:
    """Logits in another order lose; in the same, further from one another, nothing. Nor does it
    matter in which unit they are."""
    output = np.random.default_rng(1).permutation(20).astype(np.float32).reshape(1, 20) * 10
    weight = np.ones(1)
    turned = output.max() - output
    same, other, apart = ranking_loss(output, np.stack([output, turned, 3 * output]), weight)
    assert same == apart == 0 or same > apart
    assert other > 10 * max(same, 1e-3)
    halves = ranking_loss(output / 2, np.stack([turned / 2]), weight)
    np.testing.assert_allclose(halves, [other], rtol=1e-6)


@pytest.mark.parametrize("output", [np.ones((2, 3), np.float32), np.ones((2, 1), np.float32)])
def test_nothing_to_order_loses_nothing(output: np.ndarray) -> None:
    assert ranking_loss(output, np.stack([output + 1]), np.ones(2)) == 0


@pytest.mark.parametrize("choices", [Choices(), Choices(packed=False, mask=True, scale="before")])
def test_only_logits_of_a_softmax_are_ranked(choices: Choices) -> None:
    model = transformer(choices, blocks=1)
    found = [node for node in model.graph if scale_search.makes_logits(node)]
    products = [node for node in model.graph if is_product(node)]
    assert len(found) == 1
    assert len(products) == 2
    assert found[0] is products[0]
    assert isinstance(found[0], ir.Node)


def test_a_mask_may_choose_between_logits_and_a_constant() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
        g (float[2, 3, 4] q, float[2, 4, 3] k, bool[1, 3, 3] open, float[2, 3, 4] v)
          => (float[2, 3, 4] y) <float[1] shut = {-9}>
        { s = MatMul(q, k)  m = Where(open, s, shut)  a = Softmax(m)  y = MatMul(a, v) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert [scale_search.makes_logits(node) for node in model.graph] == [True, *[False] * 3]
