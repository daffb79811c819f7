"""Several heads of q on one of k and v: written out, found, quantized, equalised, equal."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from small_graph import SmallGraph, run, sample

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization.equalize import equalise
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.preparation.cleaning import clean
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.by_name import make_quantizer
from ptq_onnx.targets.checking.check import check

TOKENS, WIDTH, HEAD = 5, 16, 4
BATCHES = [sample(4, TOKENS, WIDTH, seed=s) * 3 for s in range(3)]


def linear(g: SmallGraph, x: str, columns: int, seed: int) -> str:
    weight = sample(WIDTH, columns, seed=seed) * np.exp2(sample(columns, seed=seed + 20))
    return g("Add", g("MatMul", x, weight * 0.3), sample(columns, seed=seed + 40))


def apart(g: SmallGraph, x: str, heads: int) -> str:
    split = g("Reshape", x, np.array([0, 0, heads, HEAD]))
    return g("Transpose", split, perm=[0, 2, 1, 3])


def block(form: str, shared: int = 2) -> onnx.ModelProto:
    """norm → q (4 heads), k, v → Attention → proj → residual; as one op or spelled out."""
    g = SmallGraph(("batch", TOKENS, WIDTH), 23)
    x = g("LayerNormalization", "x", sample(WIDTH, seed=1) + 2, sample(WIDTH, seed=2), axis=-1)
    q, k, v = (linear(g, x, n * HEAD, i) for i, n in enumerate((4, shared, shared)))
    if form == "flat":
        y = g("Attention", q, k, v, q_num_heads=4, kv_num_heads=shared)
    else:
        q, k, v = (apart(g, t, n) for t, n in ((q, 4), (k, shared), (v, shared)))
        if form == "heads":
            y = g("Attention", q, k, v)
        elif form == "expanded":  # repeat_interleave
            full = np.array([1, 1, 4 // shared, 1, 1])
            k, v = (
                g("Reshape", g("Expand", g("Unsqueeze", t, np.array([2])), full), np.array(to))
                for t, to in ((k, [0, 4, TOKENS, HEAD]), (v, [0, 4, TOKENS, HEAD]))
            )
            logits = g("Mul", g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2])), 0.5)
            y = g("MatMul", g("Softmax", logits, axis=-1), v)
        else:  # a product of five axes that broadcasts
            q = g("Reshape", q, np.array([0, shared, 4 // shared, TOKENS, HEAD]))
            k, v = (g("Unsqueeze", t, np.array([2])) for t in (k, v))
            logits = g("Mul", g("MatMul", q, g("Transpose", k, perm=[0, 1, 2, 4, 3])), 0.5)
            y = g("MatMul", g("Softmax", logits, axis=-1), v)
            y = g("Reshape", y, np.array([0, 4, TOKENS, HEAD]))
        y = g("Reshape", g("Transpose", y, perm=[0, 2, 1, 3]), np.array([0, 0, WIDTH]))
    return g.proto(g("Add", "x", linear(g, y, WIDTH, 7)))


def plan_of(proto: onnx.ModelProto, quantizer: str) -> Plan:
    model = ir.from_proto(proto)
    clean(model)
    fuse(model)
    blocks = find_blocks(model)
    config = QuantizeConfig(quantizer=quantizer, threads=1)
    return Plan(model, blocks, find_sites(model, blocks), config)


FORMS = ("flat", "heads", "expanded", "five axes")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [1, 2])
def test_numbers_and_roles(form: str, shared: int) -> None:
    proto = block(form, shared)
    plan = plan_of(proto, "deploy")
    found = run(plan.model, BATCHES[0])[0]
    np.testing.assert_allclose(found, run(proto, BATCHES[0])[0], rtol=1e-4, atol=1e-5)
    reference = ReferenceEvaluator(proto).run(None, {"x": BATCHES[0]})[0]
    np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-4)
    assert plan.blocks.count == 1
    roles = Counter(role.name for role in plan.blocks.roles.values())
    assert not plan.blocks.unrecognised
    for role in ("norm1", "q", "k", "v", "qk", "softmax", "av", "proj", "residual1"):
        assert roles[role] == 1, role


@pytest.mark.parametrize("form", FORMS)
def test_equalised_is_equal(form: str) -> None:
    plan = plan_of(block(form), "deploy")
    equal = equalise(plan, BATCHES)
    for x in (*BATCHES, sample(2, TOKENS, WIDTH, seed=9)):
        expected = run(plan.model, x)[0]
        error = np.abs(run(equal.model, x)[0] - expected).max()
        assert error <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("quantizer", "least"), [("deploy", 18.0), ("fqvit", 8.0)])
def test_quantized(form: str, quantizer: str, least: float) -> None:
    import torch

    plan = plan_of(block(form), quantizer)
    expected = run(plan.model, BATCHES[0])[0]
    made = make_quantizer(equalise(plan, BATCHES) if quantizer == "deploy" else plan)
    made.run(torch.from_numpy(BATCHES[0]), BATCHES)
    file = lower(made.model, made.specs)
    report = check(file, "onnxruntime")
    assert report.errors == ()
    assert report.quantized_linears == report.linears == 4
    noise = float(((run(file, BATCHES[0])[0] - expected) ** 2).sum())
    assert 10 * np.log10(float((expected**2).sum()) / noise) > least


def test_heads_that_do_not_divide_stay_one_op() -> None:
    g = SmallGraph(("batch", TOKENS, WIDTH), 23)
    q, small = (g("MatMul", "x", sample(WIDTH, n * HEAD, seed=n)) for n in (3, 2))
    model = g.model(g("Attention", q, small, small, q_num_heads=3, kv_num_heads=2))
    report = clean(model)
    assert "3 heads of q on 2 of k and v" in " ".join(report.notes)
