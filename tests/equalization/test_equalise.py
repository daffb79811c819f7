"""The equalised model is the model: same numbers, other forms; and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from prepared_models import DIGITS, ROOT, images, prepared, quantized
from small_graph import sample
from small_transformer import TOKENS, WIDTH, Choices, transformer

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.targets import ONNXRUNTIME
from ptq_onnx.equalization.equalize import equalise
from ptq_onnx.equalization.restructure import restructure
from ptq_onnx.evaluation.network import session
from ptq_onnx.preparation.model_files import serialize
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import Move, Plan

BATCHES = [sample(4, TOKENS, WIDTH, seed=s).astype(np.float32) * 3 for s in range(3)]


def plan_of(model: ir.Model, **options: object) -> Plan:
    blocks = find_blocks(model)
    config = QuantizeConfig(quantizer="deploy", threads=1, **options)  # type: ignore[arg-type]
    return Plan(model, blocks, find_sites(model, blocks), config)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    opened = session(serialize(model), 1, cpu=True)
    return opened.run(None, {opened.get_inputs()[0].name: x})[0]


def kinds(plan: Plan) -> dict[str, int]:
    found: dict[str, int] = {}
    for move in plan.moves:
        assert isinstance(move, Move)
        found[move.into] = found.get(move.into, 0) + 1
    return found


VARIANTS = {
    "packed": Choices(),
    "apart": Choices(packed=False),
    "scale before": Choices(scale="before"),
    "no scale": Choices(scale="none"),
    "mask": Choices(mask=True),
    "layer scale": Choices(layer_scale=True),
    "relu": Choices(activation="Relu"),
    "no norms": Choices(norms=False),
    "pool": Choices(pool=True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_equal_in_float(name: str) -> None:
    """To 1e-5 of the largest logit, after moves that really changed constants."""
    model = transformer(VARIANTS[name], blocks=2)
    before = serialize(model)
    plan = equalise(plan_of(model), BATCHES)
    assert serialize(model) == before
    for x in (*BATCHES, BATCHES[0][:1] * 4):
        expected = run(model, x)
        error = np.abs(run(plan.model, x) - expected).max()
        assert error <= 1e-5 * np.abs(expected).max()
    found = kinds(plan)
    assert found["k"] == found["proj"] == 2
    norms = {"no norms": 1, "pool": 4}.get(name, 5)
    assert found["LayerNormalization"] == norms


def test_forms_fire_once() -> None:
    model = transformer(Choices(), blocks=2)
    copy = model.clone()
    counts = restructure(copy, ONNXRUNTIME)
    assert counts == {
        "PatchesAsLinear": 0,
        "PackedPixelsAsLinear": 0,
        "ExpertsAsLinears": 0,
        "UnpackedAttention": 2,
        "FoldedScale": 2,
        "KeptRank": 1,
    }
    assert sum(restructure(copy, ONNXRUNTIME).values()) == 0
    assert not [n for n in copy.graph if n.op_type in ("Split", "Gemm")]
    assert sum(is_linear(n) for n in copy.graph) == 2 * 6 + 1
    for x in BATCHES:
        np.testing.assert_allclose(run(copy, x), run(model, x), rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_the_new_tensors() -> None:
    """Carried over, not measured again: extremes and means of every tensor that is quantized."""
    plan = equalise(plan_of(transformer(Choices(), blocks=2)), BATCHES)
    assert plan.statistics is not None
    fresh = equalise(replace(plan_of(plan.model), sites=plan.sites), BATCHES)
    assert fresh.statistics is not None
    copy = plan.model.clone()
    wanted = [s for s in plan.sites.values() if s.tensor in plan.statistics.channels]
    values = {str(v.name): v for n in copy.graph for v in n.outputs}
    names = [s.tensor for s in wanted if s.tensor in values and not s.is_parameter]
    assert len(names) >= 14
    for name in names:
        if not values[name].is_graph_output():
            copy.graph.outputs.append(values[name])
    opened = session(serialize(copy), 1, cpu=True)
    made = [o.name for o in opened.get_outputs()]
    found = [dict(zip(made, opened.run(None, {"x": x}), strict=True)) for x in BATCHES]
    for name in names:
        value = np.concatenate([f[name] for f in found])
        stats = plan.statistics.channels[name]
        padded = (1,) * (value.ndim - 1 - len(stats.shape)) + stats.shape
        axes = (0, *(axis + 1 for axis, size in enumerate(padded) if size == 1))
        scale = float(np.abs(value).max())
        np.testing.assert_allclose(
            stats.highest[0], value.max(axis=axes).ravel(), atol=1e-5 * scale
        )
        np.testing.assert_allclose(stats.lowest[0], value.min(axis=axes).ravel(), atol=1e-5 * scale)
        np.testing.assert_allclose(stats.mean, value.mean(axis=axes).ravel(), atol=1e-4 * scale)


def test_values_are_centred() -> None:
    """Every channel of v has mean zero, so that the map's rounding meets no common part."""
    plan = equalise(plan_of(transformer(Choices())), BATCHES)
    assert plan.statistics is not None
    (v,) = [s for s in plan.sites.values() if s.role == "v"]
    stats = plan.statistics.channels[v.tensor]
    np.testing.assert_allclose(stats.mean, 0, atol=1e-6)


def test_what_else_reads_forbids_the_move() -> None:
    """q, k or v that a second op reads too, and a norm that does not feed linears alone."""
    model = transformer(Choices())
    (softmax,) = [n for n in model.graph if n.op_type == "Softmax"]
    product = softmax.inputs[0].producer()  # type: ignore[union-attr]
    while product.op_type != "MatMul":  # type: ignore[union-attr]
        product = product.inputs[0].producer()  # type: ignore[union-attr]
    query = product.inputs[0]  # type: ignore[union-attr]
    extra = ir.node("Tanh", [query], num_outputs=1)
    extra.outputs[0].name, extra.outputs[0].dtype = "second", ir.DataType.FLOAT
    model.graph.append(extra)
    model.graph.outputs.append(extra.outputs[0])
    plan = equalise(plan_of(model), BATCHES)
    # The keys' mean goes, which no softmax sees; q keeps its scale, and so does k.
    assert [m.largest for m in plan.moves if m.into == "k"] == [1.0]
    opened = [session(serialize(m), 1, cpu=True) for m in (model, plan.model)]
    expected, found = (o.run(None, {"x": BATCHES[0]}) for o in opened)
    for e, f in zip(expected, found, strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-5)


# --- the embedded model -------------------------------------------------------------------------


def test_pixels_are_exact() -> None:
    """8-bit pictures reach the patch embedding without any error: their codes are the pixels."""
    found = prepared(DIGITS)
    preprocess = images()
    low, high = preprocess.min(), preprocess.max()
    mean, std = (0.5,), (0.5,)
    assert (low, high) == pytest.approx((-1, 1), abs=0.01)
    plan = Plan(
        found.model,
        found.blocks,
        found.sites,
        QuantizeConfig(quantizer="deploy"),
        pixels=(mean, std),
    )
    channels = preprocess.shape[1]
    plan = replace(plan, pixels=(mean * channels, std * channels))
    equal = equalise(plan, [preprocess[:8]])
    (tensor,) = equal.fixed
    assert equal.fixed[tensor] == pytest.approx((0.0, 2.0))
    values = (preprocess[:8] + 1) / (2 / 255)
    assert np.abs(values - np.rint(values)).max() < 1e-3
    expected, other = run(found.model, preprocess[:4]), run(equal.model, preprocess[:4])
    np.testing.assert_allclose(other, expected, rtol=1e-3, atol=1e-4)


def test_equalisation_pays() -> None:
    """On unseen images, from 128: the logits are closer, although the patches are quantized too."""
    seen, unseen = images(count=128), images(folder=ROOT / "img/digits/val", count=64)
    expected = run(prepared(DIGITS).model, unseen)

    def noise(**options: bool) -> float:
        quantizer = quantized(DIGITS, seen, quantizer="deploy", **options)
        found = run(lower(quantizer.model, quantizer.specs), unseen)
        return float(((found - expected) ** 2).sum())

    assert 10 * np.log10(noise(equalize=False) / noise()) > 0.5
