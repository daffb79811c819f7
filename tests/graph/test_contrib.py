"""ONNX Runtime's own ops, and those of opset 23, are read back into standard ones; numbers stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from small_graph import SmallGraph, run, sample

from ptq_onnx.errors import ModelError
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.preparation.cleaning import clean
from ptq_onnx.preparation.model_files import load, serialize
from ptq_onnx.preparation.prepare import prepare

MS = "com.microsoft"
D = 8
X = sample(2, 5, D)
GAMMA, BETA = sample(D, seed=1) + 1, sample(D, seed=2)


def skip_norm(g: SmallGraph) -> str:
    other = g("Relu", "x")
    return g("SkipLayerNormalization", "x", other, GAMMA, BETA, BETA, domain=MS, epsilon=1e-6)


def skip_norm_with_sum(g: SmallGraph) -> str:
    norm = g(
        "SkipLayerNormalization", "x", g("Relu", "x"), GAMMA, BETA, domain=MS, outputs=4,
        epsilon=1e-6,
    )  # fmt: skip
    return g("Add", norm, f"{norm}_3")


def skip_simple(g: SmallGraph) -> str:
    return g(
        "SkipSimplifiedLayerNormalization", "x", g("Relu", "x"), GAMMA, domain=MS, epsilon=1e-6
    )


def attention(g: SmallGraph) -> str:
    return g(
        "Attention", "x", sample(D, 3 * D, seed=3) * 0.3, sample(3 * D, seed=4), domain=MS,
        num_heads=2,
    )  # fmt: skip


def heads(g: SmallGraph) -> str:
    k, v = g("Neg", "x"), g("Relu", "x")
    return g(
        "MultiHeadAttention", "x", k, v, sample(3 * D, seed=4), domain=MS, num_heads=2, scale=0.4
    )


def causal(g: SmallGraph) -> str:
    k, v = g("Neg", "x"), g("Relu", "x")
    return g("MultiHeadAttention", "x", k, v, domain=MS, num_heads=2, unidirectional=1)


CASES = {
    "SkipLayerNormalization": (skip_norm, {"LayerNormalization": 1}),
    "the sum as output": (skip_norm_with_sum, {"LayerNormalization": 1}),
    "SkipSimplified": (skip_simple, {"RMSNormalization": 1}),
    "BiasGelu": (lambda g: g("BiasGelu", "x", BETA, domain=MS), {"Gelu": 1}),
    "FastGelu": (lambda g: g("FastGelu", "x", BETA, domain=MS), {"Gelu": 1}),
    "Gelu": (lambda g: g("Gelu", "x", domain=MS), {"Gelu": 1}),
    "QuickGelu": (lambda g: g("QuickGelu", "x", domain=MS, alpha=1.702), {"QuickGelu": 1}),
    "Silu": (lambda g: g("QuickGelu", "x", domain=MS, alpha=1.0), {"Silu": 1}),
    "FusedMatMul": (
        lambda g: g("FusedMatMul", "x", g("Relu", "x"), domain=MS, transB=1, alpha=0.5),
        {"MatMul": 1, "Mul": 1},
    ),
    "transposed weight": (
        lambda g: g("FusedMatMul", "x", sample(4, D, seed=5), domain=MS, transB=1),
        {"Linear": 1},
    ),
    "Attention": (attention, {"Softmax": 1, "Linear": 1}),
    "MultiHeadAttention": (heads, {"Softmax": 1}),
    "causal": (causal, {"Softmax": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_read_back(name: str, tmp_path: Path) -> None:
    build, expected = CASES[name]
    g = SmallGraph(("batch", 5, D))
    out = g("Identity", build(g))
    proto = g.proto(out)
    model = ir.from_proto(proto)
    report = clean(model)
    fuse(model)
    kinds = [node.op_type for node in model.graph]
    assert {kind: kinds.count(kind) for kind in expected} == expected
    assert {node.domain for node in model.graph} <= {"", "ptq_onnx"}
    assert report.notes == ()
    for found, reference in zip(run(model, X), run(proto, X), strict=True):
        np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-5)


def test_an_op_without_a_formula_stays_and_is_told() -> None:
    g = SmallGraph(("batch", 5, D))
    out = g("Relu", g("Inverse", "x", domain=MS))
    model = ir.from_proto(g.proto(out))
    report = clean(model)
    assert "Inverse" in report.notes[0]
    assert "Inverse" in [n.op_type for n in model.graph]


def test_a_graph_that_a_session_has_optimized(tmp_path: Path) -> None:
    """LayerNormalization in the standard domain of opset 14, which has none."""
    g = SmallGraph(("batch", 3, 4, D), opset=14)
    mean = g("ReduceMean", "x", axes=[-1])
    centred = g("Sub", "x", mean)
    variance = g("ReduceMean", g("Pow", centred, 2.0), axes=[-1])
    norm = g("Div", centred, g("Sqrt", g("Add", variance, 1e-5)))
    out = g("Add", g("Mul", norm, GAMMA), BETA)
    source = g.save(tmp_path / "source.onnx", out)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds == ["LayerNormalization"]
    prepared = prepare(tmp_path / "optimized.onnx")
    assert [n.op_type for n in prepared.model.graph] == ["LayerNormalization"]
    x = sample(2, 3, 4, D)
    np.testing.assert_allclose(
        run(onnx.load_from_string(serialize(prepared.model)), x)[0], run(source, x)[0], atol=1e-5
    )


@pytest.mark.parametrize("op", ["QuantizeLinear", "DynamicQuantizeLinear"])
def test_a_quantized_model_is_refused(op: str, tmp_path: Path) -> None:
    g = SmallGraph(("batch", 3, 4, 4))
    inputs = [] if op.startswith("Dynamic") else [0.1, np.array(0, np.uint8)]
    codes = g(op, "x", *inputs, outputs=1 if inputs else 3)
    scale = 0.1 if inputs else f"{codes}_1"
    zero = np.array(0, np.uint8) if inputs else f"{codes}_2"
    path = g.save(tmp_path / "q.onnx", g("DequantizeLinear", codes, scale, zero))
    load(path)
    with pytest.raises(ModelError, match="quantized already"):
        prepare(path)


# --- opset 23 -----------------------------------------------------------------------------


def test_attention_of_opset_23() -> None:
    """Flat and split heads, a mask of booleans, causal: all become products and a softmax."""
    keep = np.tril(np.ones((5, 5), bool))
    for options in (
        {"q_num_heads": 2, "kv_num_heads": 2},
        {"q_num_heads": 2, "kv_num_heads": 2, "is_causal": 1},
        {"q_num_heads": 4, "kv_num_heads": 4, "scale": 0.3},
    ):
        for mask in ((), (keep,), (sample(5, 5, seed=8),)):
            if mask and "is_causal" in options:
                continue
            g = SmallGraph(("batch", 5, D), 23)
            inputs = ("x", g("Neg", "x"), g("Relu", "x"))
            proto = g.proto(g("Attention", *inputs, *mask, **options))
            model = ir.from_proto(proto)
            report = clean(model)
            assert report.opset == 21
            assert [n.op_type for n in model.graph].count("Softmax") == 1
            np.testing.assert_allclose(run(model, X)[0], run(proto, X)[0], rtol=1e-4, atol=1e-5)


def test_rms_normalization_of_opset_23() -> None:
    g = SmallGraph(("batch", 5, D), 23)
    proto = g.proto(g("RMSNormalization", "x", GAMMA, axis=-1, epsilon=1e-6))
    model = ir.from_proto(proto)
    clean(model)
    assert fuse(model)["RMSNormalization"] == 1
    assert [n.op_type for n in model.graph] == ["RMSNormalization"]
    np.testing.assert_allclose(run(model, X)[0], run(proto, X)[0], rtol=1e-4, atol=1e-5)
