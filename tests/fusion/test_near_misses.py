"""Mutated spellings of LayerNorm, GELU and attention: fused or left alone, never changed.

Hypothesis draws a spelling and one mutation of it: a constant, an axis, a power, an extra reader,
an intermediate result as output, another operand. Whatever cleaning and fusion make of the graph,
it computes what it computed before; and no mutation that changes the formula is fused.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_graph import SmallGraph, run, sample

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.fusion.near_miss import near_misses
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.preparation.cleaning import clean

D = 8
X = sample(2, 5, D) * 2 + 0.5
FAST = settings(max_examples=40, suppress_health_check=list(HealthCheck), derandomize=True)


def check(g: SmallGraph, outputs: list[str]) -> tuple[dict[str, int], ir.Model]:
    """The numbers stay; returns the fusion counts and the fused model."""
    proto = g.proto(*dict.fromkeys(outputs))
    model = ir.from_proto(proto)
    clean(model)
    counts = fuse(model)
    for found, expected in zip(run(model, X), run(proto, X), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    return counts, model


NORM_MUTATIONS = ("none", "power", "axis", "variance axis", "epsilon tensor", "reader", "output")
NORM_MUTATIONS += ("other x", "gamma shape", "root", "keepdims")


@FAST
@given(
    mutation=st.sampled_from(NORM_MUTATIONS),
    square=st.sampled_from(("pow", "mul")),
    root=st.sampled_from(("div", "reciprocal", "pow")),
    affine=st.booleans(),
    where=st.integers(0, 5),
    power=st.sampled_from((1.0, 3.0, 2.5)),
)
def test_layer_norm(
    mutation: str, square: str, root: str, affine: bool, where: int, power: float
) -> None:
    g = SmallGraph(("batch", 5, D))
    axis = 1 if mutation == "axis" else -1
    mean = g("ReduceMean", "x", np.array([axis]), keepdims=1)
    other = g("Mul", "x", 1.5) if mutation == "other x" else "x"
    centred = g("Sub", other, mean)
    if mutation == "power":
        square = "pow"
    exponent = power if mutation == "power" else 2.0
    base = g("Abs", centred) if mutation == "power" else centred
    squared = g("Pow", base, exponent) if square == "pow" else g("Mul", base, base)
    axes = np.array([1 if mutation == "variance axis" else axis])
    variance = g("ReduceMean", squared, axes, keepdims=1)
    epsilon = np.linspace(0.1, 0.3, D) if mutation == "epsilon tensor" else 1e-6
    shifted = g("Add", variance, epsilon)
    if root == "pow":
        y = g("Mul", centred, g("Pow", shifted, -0.4 if mutation == "root" else -0.5))
    else:
        deviation = g("Pow", shifted, 0.4) if mutation == "root" else g("Sqrt", shifted)
        if root == "div":
            y = g("Div", centred, deviation)
        else:
            y = g("Mul", centred, g("Reciprocal", deviation))
    if affine:
        gamma = sample(5, D, seed=2) if mutation == "gamma shape" else sample(D, seed=1) + 1
        y = g("Add", g("Mul", y, gamma), sample(D, seed=3))
    outputs = [y]
    inner = [n.output[0] for n in g.nodes if n.output[0] != y]
    if mutation == "reader":
        outputs.append(g("Relu", inner[where % len(inner)]))
    if mutation == "output":
        outputs.append(inner[where % len(inner)])
    counts, _ = check(g, outputs)
    # A centred x that is read elsewhere, or a mean, may leave a norm of what is left; the formula
    # itself is only there where nothing of it was changed.
    changed = mutation not in ("none", "gamma shape", "reader", "output", "keepdims")
    if changed:
        assert counts["LayerNormalization"] == 0
    if mutation == "none":
        assert counts["LayerNormalization"] == 1


GELU_MUTATIONS = ("none", "root", "half", "one", "other x", "reader", "output", "power", "inner")


@FAST
@given(
    mutation=st.sampled_from(GELU_MUTATIONS),
    tanh=st.booleans(),
    order=st.integers(0, 2),
    where=st.integers(0, 4),
    by=st.floats(1.001, 1.5),
)
def test_gelu(mutation: str, tanh: bool, order: int, where: int, by: float) -> None:
    g = SmallGraph(("batch", 5, D))
    root = math.sqrt(2) * (by if mutation == "root" else 1)
    half = 0.4 if mutation == "half" else 0.5
    one = by if mutation == "one" else 1.0
    tanh = tanh or mutation in ("power", "inner")
    if tanh:
        cube = g("Pow", "x", 2.0 if mutation == "power" else 3.0)
        inner = g("Mul", cube, 0.044715 * (by if mutation == "inner" else 1))
        factor = math.sqrt(2 / math.pi) * (by if mutation == "root" else 1)
        f = g("Tanh", g("Mul", g("Add", "x", inner), factor))
    else:
        f = g("Erf", g("Div", "x", root))
    plus = g("Add", f, one)
    x = g("Relu", "x") if mutation == "other x" else "x"
    if order == 0:
        y = g("Mul", g("Mul", x, half), plus)
    elif order == 1:
        y = g("Mul", g("Mul", x, plus), half)
    else:
        y = g("Mul", x, g("Mul", plus, half))
    outputs = [y]
    if mutation == "reader":
        outputs.append(g("Relu", (f, plus)[where % 2]))
    if mutation == "output":
        outputs.append((f, plus)[where % 2])
    counts, model = check(g, outputs)
    assert counts["Gelu"] == (mutation == "none")
    if mutation != "none":
        assert [m.family for m in near_misses(model)].count("Gelu") >= 1


ATTENTION_MUTATIONS = ("none", "axis", "vector scale", "reader", "output", "no values", "self")


@FAST
@given(
    mutation=st.sampled_from(ATTENTION_MUTATIONS),
    before=st.booleans(),
    mask=st.sampled_from(("none", "bias", "shut", "both")),
    turned=st.booleans(),
    where=st.integers(0, 3),
)
def test_attention(mutation: str, before: bool, mask: str, turned: bool, where: int) -> None:
    g = SmallGraph(("batch", 5, D))
    q, k, v = (
        g("Add", g("MatMul", "x", sample(D, D, seed=i) * 0.4), sample(D, seed=i + 9))
        for i in range(3)
    )
    scale = np.linspace(0.2, 0.5, D) if mutation == "vector scale" else 0.35
    if before or mutation == "vector scale":
        q = g("Mul", q, scale)
    logits = g("MatMul", q, g("Transpose", k, perm=[0, 2, 1]))
    if not before and mutation != "vector scale":
        logits = g("Mul", logits, scale)
    inner = [q, k, v, logits]
    if mask != "none":
        table = sample(5, 5, seed=7) if mask in ("bias", "both") else np.zeros((5, 5))
        shut = np.triu(np.full((5, 5), -100.0), 1) if mask in ("shut", "both") else 0
        logits = g("Add", logits, table + shut)
    weights = g("Softmax", logits, axis=1 if mutation == "axis" else -1)
    if mutation == "no values":
        y = weights
    elif turned:
        swapped = g("Transpose", weights, perm=[0, 2, 1])
        y = g("MatMul", g("Transpose", v, perm=[0, 2, 1]), swapped)
    else:
        y = g("MatMul", weights, weights if mutation == "self" else v)
    outputs = [y]
    if mutation == "reader":
        outputs.append(g("Relu", inner[where]))
    if mutation == "output":
        outputs.append(inner[where])
    counts, model = check(g, outputs)
    blocks = find_blocks(model)
    assert blocks.count == (mutation != "no values")
    if mask == "both" and mutation not in ("axis",):
        assert counts["AttentionMask"] == 1
        roles = [r.name for r in blocks.roles.values()]
        assert mutation == "no values" or (roles.count("bias"), roles.count("mask")) == (1, 1)
