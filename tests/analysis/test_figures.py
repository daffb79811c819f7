"""Every figure of the report computed anew in float64, and the same whatever the batch size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from small_transformer import TOKENS, WIDTH, Choices, transformer

from ptq_onnx.analysis.advice import advise
from ptq_onnx.analysis.attention_values import attention_values
from ptq_onnx.analysis.graphwise import graphwise
from ptq_onnx.analysis.modules import find_modules, left_in_float
from ptq_onnx.analysis.sensitivity import sensitivity
from ptq_onnx.analysis.variants import Images
from ptq_onnx.analysis.variation import variation
from ptq_onnx.analysis.variation_results import TensorVariation, Variation
from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.numerics.around.token_mean import TokenMean
from ptq_onnx.numerics.codes.log2 import Log2
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer

COUNT = 11
SIZES = (1, 3, 8)
X = np.random.default_rng(5).normal(size=(COUNT, TOKENS, WIDTH)).astype(np.float32)
KINDS = {
    "rows": {"quantizer": "deploy"},
    "centred": {"quantizer": "deploy", "target": "tensorrt", "centre_values": True},
    "narrow": {"quantizer": "vanilla", "bits": "4/4/3"},
    "ptf, log2": {"quantizer": "fqvit", "lis": True},
    "ptf, shares": {"quantizer": "fqvit"},
    "blocks of codes": {"quantizer": "deploy", "rounding": "gptq", "bits": "3/8/8"},
}


def quantized(kind: str, **more: Any) -> SiteQuantizer:
    options: dict[str, Any] = {**KINDS[kind], "threads": 1, **more}
    if options["quantizer"] == "deploy":
        options["equalize"] = False
    model = transformer(Choices(), blocks=2)
    if options.get("target") == "tensorrt":
        model.graph.opset_imports[""] = 20
    blocks = find_blocks(model)
    plan = Plan(model, blocks, find_sites(model, blocks), QuantizeConfig(**options))
    quantizer = make_quantizer(plan)
    calib = np.random.default_rng(6).normal(size=(16, TOKENS, WIDTH)).astype(np.float32)
    quantizer.run(torch.from_numpy(calib[:1]), [0.7 * calib[:8], 0.7 * calib[8:]])
    return quantizer


shared = cache(quantized)


def batches(size: int, x: np.ndarray = X) -> list[np.ndarray]:
    return [x[i : i + size] for i in range(0, len(x), size)]


def filled(size: int) -> list[np.ndarray]:
    """Whole batches: the last image fills up the last."""
    missing = -COUNT % size
    return batches(size, np.concatenate([X, np.repeat(X[-1:], missing, axis=0)]))


def values(model: ir.Model, names: list[str], x: np.ndarray = X) -> dict[str, np.ndarray]:
    """Tensors of a float model, all images at once, in a session of its own."""
    copy = graphs.to_standard(model)
    made = {v.name: v for n in copy.graph for v in n.outputs}
    own = {v.name for v in copy.graph.outputs}
    copy.graph.outputs.extend(made[n] for n in names if n in made and n not in own)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        graphs.serialize(copy), options, providers=["CPUExecutionProvider"]
    )
    wanted = [n for n in names if n in made]
    found = dict(zip(wanted, session.run(wanted, {"x": x}), strict=True))
    return {**found, **({"x": x} if "x" in names else {})}


def numbers(value: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """Every number of nested results, with its place."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from numbers(item, f"{where}[{index}]")
    elif isinstance(value, int | float):
        yield where, float(value)


def assert_same(results: list[Any], rel: float = 1e-6, abs_: float = 1e-9) -> None:
    first, *others = [dict(numbers(one)) for one in results]
    assert len(first) > 10
    for other in others:
        assert other.keys() == first.keys()
        for place, number in first.items():
            assert other[place] == pytest.approx(number, rel=rel, abs=abs_), place


def ratio(f: np.ndarray, q: np.ndarray) -> float:
    f, q = f.astype(np.float64), q.astype(np.float64)
    return float(((q - f) ** 2).sum() / (f**2).sum())


# --- variation


def varied(quantizer: SiteQuantizer, size: int, fill: bool = False) -> Variation:
    plan = quantizer.plan
    return variation(
        plan.model, plan.blocks, plan.sites, quantizer.specs,
        filled(size) if fill else batches(size), rounded=quantizer.model, count=COUNT, threads=1,
    )  # fmt: skip


def rounded(v: np.ndarray, quantizer: SiteQuantizer, tensor: str) -> tuple[np.ndarray, np.ndarray]:
    """A tensor's values rounded by its spec, and which are outside, by the definitions."""
    spec = quantizer.specs[tensor]
    if spec.rule.code == Log2():
        t = np.rint(1 / v)
        code = np.floor(np.log2(t)) + (t >= 1.5 * 2.0 ** np.floor(np.log2(t)))
        held = np.where(code >= min(2**spec.rule.bits - 1, 126), 0, 2.0**-code)
        return held, np.zeros(v.shape, bool)
    step = spec.scale.astype(np.float64)
    if spec.axis is not None:
        step = step.reshape([-1 if a == spec.axis else 1 for a in range(v.ndim)])
    zero = int(np.max(spec.zero_point))
    factor = 1 if spec.factor is None else spec.factor
    mean: Any = 0
    top: Any = 1
    if TokenMean() in spec.rule.around:
        mean = np.rint(v / step).mean(axis=-2, keepdims=True) * step
    if spec.rule.granularity == "row":
        top = v.max(axis=-1, keepdims=True)
    low, high = spec.rule.limits
    code = np.rint((v - mean) / top / factor / step) + zero
    return (np.clip(code, low, high) - zero) * step * factor * top + mean, (
        (code < low) | (code > high)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_variation(kind: str) -> None:
    quantizer = shared(kind)
    plan = quantizer.plan
    results = [varied(quantizer, size) for size in SIZES]
    assert_same([*results, varied(quantizer, 4, fill=True)])
    assert results[0].images == COUNT
    floats = values(plan.model, [s.tensor for s in plan.sites.values() if not s.is_parameter])
    seen: set[str] = set()
    for one in results[0].tensors:
        constant = plan.model.graph.initializers.get(one.tensor)
        held = quantizer.model.graph.initializers.get(one.tensor)
        v = floats[one.tensor] if constant is None else constant.const_value.numpy()  # type: ignore[union-attr]
        start = v if held is None else held.const_value.numpy()  # type: ignore[union-attr]
        _check(one, v.astype(np.float64), plan.sites[one.tensor].channel_axes)
        if one.tensor not in quantizer.specs:
            assert one.snr is one.snr_db is one.clip is one.clipped is one.clip_of is None
            continue
        found, _ = rounded(start.astype(np.float64), quantizer, one.tensor)
        _, outside = rounded(v.astype(np.float64), quantizer, one.tensor)
        assert one.snr == pytest.approx(ratio(v, found), rel=0.03, abs=1e-12), one.tensor
        assert one.snr_db == pytest.approx(-10 * math.log10(ratio(v, found)), abs=0.15)
        assert one.clipped == pytest.approx(outside.mean(), abs=2e-3)
        noise = (found - v) ** 2
        assert one.clip_noise == pytest.approx(noise[outside].sum() / noise.sum(), abs=0.03)
        seen.add(str(one.clip_of))
    assert seen == {"rows": {"row", "values"}, "centred": {"centred", "values"},
                    "blocks of codes": {"row", "values"},
                    "ptf, shares": {"row", "values"}}.get(kind, {"values"})  # fmt: skip


def _check(one: TensorVariation, v: np.ndarray, channel_axes: tuple[int, ...]) -> None:
    """What is said of the float values."""
    assert (one.low, one.high) == pytest.approx((v.min(), v.max()), rel=1e-6)
    others = tuple(a for a in range(v.ndim) if a not in channel_axes)
    means = np.abs(v).mean(axis=others).ravel()
    assert one.absolute_mean == pytest.approx(np.abs(v).mean(), rel=1e-6)
    if one.sdam is not None:
        assert one.sdam == pytest.approx(means.std(), rel=1e-5)
    centred = v - v.mean()
    assert one.kurtosis == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2, rel=1e-5)
    if one.channel_ratio is not None:
        extremes = np.abs(v).max(axis=others).ravel()
        assert one.channel_ratio == pytest.approx(extremes.max() / np.median(extremes), rel=1e-5)
    counts, _ = np.histogram(v, bins=64, range=(one.low, one.high))
    found = np.array(one.histogram.float_counts)
    assert found.sum() == counts.sum() == v.size
    assert np.abs(found - counts).sum() <= 0.02 * v.size + 2


def test_rows_are_not_the_worst() -> None:
    """Row-scaled maps by one scale for the whole tensor would seem 10 dB worse than they are."""
    quantizer = shared("rows")
    found = varied(quantizer, 8)
    for one in found.tensors:
        if one.role == "softmax":
            assert one.snr_db is not None
            assert one.snr_db > 45
            assert one.clipped == 0


# --- every op


@pytest.mark.parametrize("kind", ["rows", "centred", "narrow"])
def test_graphwise(kind: str) -> None:
    quantizer = shared(kind)
    plan, model = quantizer.plan, quantizer.model
    simulator = Simulator(model, quantizer, threads=1)
    reference = Simulator(plan.model, None, threads=1)
    measure = partial(
        graphwise, model, quantizer, plan.blocks, held_apart=True, sites=plan.sites,
        simulator=simulator, reference=reference, count=COUNT, threads=1,
    )  # fmt: skip
    results = [measure(b) for b in (*map(batches, SIZES), filled(4))]
    assert_same(results, rel=1e-3, abs_=2e-5)
    found = results[2]
    assert found.images == COUNT
    names = [op.tensor for op in found.ops]
    floats, others = values(plan.model, names), simulator.run(X, names)
    for op in found.ops:
        f, q = floats[op.tensor].astype(np.float64), others[op.tensor].astype(np.float64)
        assert op.snr == pytest.approx(ratio(f, q), rel=2e-2, abs=1e-10), op
        assert op.mse == pytest.approx(((q - f) ** 2).mean(), rel=2e-2, abs=1e-10)
        assert op.max_abs == pytest.approx(np.abs(q - f).max(), rel=2e-2, abs=1e-4)
        cosine = (f * q).sum() / math.sqrt((f**2).sum() * (q**2).sum())
        assert op.cosine == pytest.approx(cosine, abs=1e-5)
        assert op.snr_db == (math.inf if op.snr == 0 else pytest.approx(-10 * math.log10(op.snr)))
    output = str(model.graph.outputs[0].name)
    assert found.logits is not None
    same = floats[output].argmax(1) == others[output].argmax(1)
    assert found.logits.agreement == pytest.approx(100 * same.mean())


def test_no_error_is_no_number() -> None:
    """Where nothing is quantized before an op its ratio is 0: no 200 dB, and null in JSON."""
    quantizer = quantized("rows", keep_float=("all@0",))
    plan = quantizer.plan
    found = graphwise(
        quantizer.model, quantizer, plan.blocks, batches(4), held_apart=True, sites=plan.sites,
        threads=1,
    )  # fmt: skip
    first = [op for op in found.ops if op.block == 0]
    assert first
    assert {(op.snr, op.snr_db) for op in first} == {(0.0, math.inf)}
    assert found.blocks[0].snr_db == math.inf
    assert math.isfinite(found.blocks[1].snr_db)


# --- attention


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    def rank(row: np.ndarray) -> np.ndarray:
        below = (row[None, :] < row[:, None]).sum(1)
        return below + ((row[None, :] == row[:, None]).sum(1) - 1) / 2

    one, other = rank(a), rank(b)
    if one.std() == 0 or other.std() == 0:
        return float(one.std() == other.std())
    return float(np.corrcoef(one, other)[0, 1])


def turned(a: np.ndarray, b: np.ndarray) -> float:
    pairs = [(i, j) for i, j in itertools.combinations(range(len(a)), 2) if a[i] != a[j]]
    wrong = sum(np.sign(a[i] - a[j]) != np.sign(b[i] - b[j]) for i, j in pairs)
    return wrong / max(len(pairs), 1)


@pytest.mark.parametrize("kind", ["rows", "narrow", "ptf, log2"])
def test_attention(kind: str) -> None:
    quantizer = shared(kind)
    plan = quantizer.plan
    reference = Simulator(plan.model, None, threads=1)
    simulator = Simulator(quantizer.model, quantizer, threads=1)

    def measure(parts: list[np.ndarray]) -> Any:
        names = [[str(i) for i in range(len(p))] for p in parts]
        names[-1] = names[-1][: COUNT - sum(map(len, names[:-1]))]
        return attention_values(
            plan.model, plan.blocks, reference, simulator, zip(names, parts, strict=True),
            quantizer.specs,
        )  # fmt: skip

    results = [measure(p) for p in (*map(batches, SIZES), filled(4))]
    assert_same(results, rel=1e-4, abs_=1e-5)
    assert results[0].images == COUNT
    softmax = {s.block: s.tensor for s in plan.sites.values() if s.role == "softmax"}
    floats = values(plan.model, list(softmax.values()))
    others = simulator.run(X, list(softmax.values()))
    for block in results[0].blocks:
        f, q = (maps[softmax[block.block]].astype(np.float64) for maps in (floats, others))
        rows, after = f.reshape(-1, TOKENS), q.reshape(-1, TOKENS)
        ranks = [spearman(a, b) for a, b in zip(rows, after, strict=True)]
        assert block.rank == pytest.approx(np.mean(ranks), abs=2e-3)
        # Of six rows a head and image the first has its pairs counted.
        pairs = list(zip(f[:, :, 0].reshape(-1, TOKENS), q[:, :, 0].reshape(-1, TOKENS),
                         strict=True))  # fmt: skip
        assert block.discordant == pytest.approx(np.mean([turned(*p) for p in pairs]), abs=5e-3)
        assert block.snr == pytest.approx(ratio(f, q), rel=2e-2)
        spec = quantizer.specs[softmax[block.block]]
        own = block.own
        assert own is not None
        assert (own.code, own.bits) == (spec.rule.code.name, spec.rule.bits)
        assert own.row == (spec.rule.granularity == "row")
        held, _ = rounded(f, quantizer, softmax[block.block])
        assert own.snr == pytest.approx(ratio(f, held), rel=2e-2)
        after = held.reshape(-1, TOKENS)
        ranks = [spearman(a, b) for a, b in zip(rows, after, strict=True)]
        assert own.rank == pytest.approx(np.mean(ranks), abs=5e-3)
        assert own.row_sum[1] == pytest.approx(held.sum(-1).mean(), rel=1e-4)
        assert own.zero == pytest.approx((held == 0).mean(), abs=2e-3)


def test_advice_gives_the_figures_of_the_bits_in_use() -> None:
    quantizer = shared("narrow")
    plan = quantizer.plan
    attention = attention_values(
        plan.model, plan.blocks, Simulator(plan.model, None, threads=1),
        Simulator(quantizer.model, quantizer, threads=1), [(["a"] * COUNT, X)], quantizer.specs,
    )  # fmt: skip
    assert attention is not None
    (text,) = advise(plan.config, plan.sites, quantizer.specs, None, None, attention)
    own = np.mean([b.own.rank for b in attention.blocks if b.own is not None])
    log2 = np.mean([c.rank for b in attention.blocks for c in b.codes
                    if (c.code, c.bits) == ("log2", 3)])  # fmt: skip
    four = np.mean([c.rank for b in attention.blocks for c in b.codes
                    if (c.code, c.bits) == ("uniform", 4)])  # fmt: skip
    assert "in 3 uniform bits keeps little" in text
    assert f"(rank correlation {own:.2f};" in text
    assert f"log2 codes of 3 bits {log2:.2f}" in text
    assert f"{own:.2f}" != f"{four:.2f}"


# --- module by module


@pytest.mark.parametrize("kind", ["rows", "narrow"])
def test_sensitivity_does_not_depend_on_the_batch(kind: str) -> None:
    quantizer = shared(kind)
    plan = quantizer.plan
    results = []
    for size in SIZES:
        found = sensitivity(
            quantizer.model, quantizer.specs, plan.blocks, plan.sites, Images(X, size),
            held_apart=True, reference=plan.model, threads=1,
        )  # fmt: skip
        results.append((found.baseline, found.layerwise, found.leave_one_out))
    assert_same(results, rel=2e-2, abs_=2e-3)


CHOSEN = ("q@0", "v@1", "softmax@0", "fc2@1", "qkv", "all@1")


@pytest.mark.parametrize("kind", ["rows", "narrow"])
def test_leave_one_out_is_what_keep_float_gives(kind: str) -> None:
    """Ops, a kind and a block against the file of a run with that option."""
    quantizer = shared(kind)
    plan = quantizer.plan
    left = partial(left_in_float, quantizer=quantizer)
    found = sensitivity(
        quantizer.model, quantizer.specs, plan.blocks, plan.sites, Images(X), held_apart=True,
        reference=None if quantizer.model is plan.model else plan.model, left_in_float=left,
        threads=1,
    )  # fmt: skip
    output = str(plan.model.graph.outputs[0].name)
    truth = values(plan.model, [output])[output]
    partners, seen = 0, set[str]()
    modules = {(m.name, m.scope): m for m in find_modules(
        plan.model, plan.blocks, plan.sites, quantizer.specs) if m.part == "all"}  # fmt: skip
    for one in found.leave_one_out:
        if one.part != "all" or one.scope == "model":
            continue
        role = "all" if one.scope == "block" else one.role
        option = f"{role}" if one.block is None else f"{role}@{one.block}"
        kept = ("qkv", "q", "k", "v") if option == "qkv" and one.scope == "kind" else (option,)
        if option not in CHOSEN:
            continue
        run = quantized(kind, keep_float=kept)
        file = values(lower(run.model, run.specs), [output])
        expected = ratio(truth, file[output])
        assert one.tensors == len(quantizer.specs) - len(run.specs), option
        assert one.error.snr == pytest.approx(expected, rel=0.03, abs=1e-12), option
        seen.add(option)
        partners += one.tensors > len(modules[one.module, one.scope].tensors)
    assert seen == set(CHOSEN)
    if kind != "narrow":
        assert partners  # as q, whose product needs k in codes too
