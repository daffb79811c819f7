"""Shift and factor of every move, from the float model's statistics by the formulas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from numpy.typing import NDArray
from small_graph import SmallGraph, assert_shapes, run, sample
from small_transformer import TOKENS, WIDTH, Choices, transformer

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import is_linear, through_layout
from ptq_onnx.calibration.mean_centred import SUFFIX, collect_centred
from ptq_onnx.calibration.robust import robust_range, shared_range
from ptq_onnx.calibration.statistics import ChannelStatistics
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.config.targets import TARGETS, Target
from ptq_onnx.equalization.equalize import equalise
from ptq_onnx.equalization.factor_search import Choice, Product, Records, balance, choose_factor
from ptq_onnx.equalization.restructure import restructure
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.graph.expansions import to_standard
from ptq_onnx.graph.formula import constant
from ptq_onnx.numerics.ptf import needed_step, zero_points
from ptq_onnx.numerics.spec import Site
from ptq_onnx.quantizers.base import Move, Plan

Array = NDArray[np.float64]
BATCHES = [sample(4, TOKENS, WIDTH, seed=s).astype(np.float32) * 3 + 1 for s in range(3)]
SYMMETRIC, UNSIGNED = (-128, 127), (0, 255)


@dataclass(frozen=True)
class Float:
    """The float model in the target's form, and what is seen of it."""

    target: Target
    model: ir.Model
    sites: dict[str, Site]
    channels: dict[str, ChannelStatistics]

    def of(self, role: str) -> str:
        (name,) = [
            s.tensor for s in self.sites.values() if s.role == role and s.tensor in self.channels
        ]
        return name

    def bounds(self, name: str) -> tuple[Array, Array]:
        low, high = robust_range(self.channels[name])
        return low.astype(np.float64), high.astype(np.float64)

    def records(self, name: str) -> Records:
        stats = self.channels[name]
        return Records(stats.record_ratio, 12, stats.count / 12)

    def products(self, name: str) -> list[Product]:
        """The weights of the linears that read a tensor."""
        values = {v.name: v for n in self.model.graph for v in n.outputs}
        nodes = dict.fromkeys(n for n, _ in through_layout(values[name]) if is_linear(n))
        found = [constant(node.inputs[1]) for node in nodes]
        return [Product(np.abs(w).astype(np.float32)) for w in found if w is not None]


def float_model(model: ir.Model, target: str, centre: bool = False) -> Float:
    copy, found = model.clone(), TARGETS[target]
    restructure(copy, found)
    common.RemoveUnusedNodesPass()(copy)
    sites = find_sites(copy, find_blocks(copy))
    wanted = [s for s in sites.values() if not s.is_parameter and s.role != "input"]
    centred = [s for s in wanted if centre and s.role == "v"]
    stats = collect_centred(copy, wanted, centred, BATCHES, threads=1)
    return Float(found, copy, sites, stats.channels)


def plan_of(model: ir.Model, **options: object) -> Plan:
    blocks = find_blocks(model)
    config = QuantizeConfig(quantizer="deploy", threads=1, **options)  # type: ignore[arg-type]
    return Plan(model, blocks, find_sites(model, blocks), config)


def half_of(low: Array, high: Array, symmetric: bool) -> Array:
    """Half the range that each channel takes of one zero point's, the best of the candidates."""
    limits = SYMMETRIC if symmetric else UNSIGNED
    steps = [
        needed_step(low, high, zero, limits) for zero in zero_points(low, high, limits, symmetric)
    ]
    best = min(steps, key=lambda s: float((s**2).sum()))
    return best * 127.5


def check(plan: Plan, name: str, before: ChannelStatistics, shift: Array, factor: Array) -> None:
    """What the plan knows of a tensor is what was seen, less the shift, over the factor."""
    assert plan.statistics is not None
    found = plan.statistics.channels[name]
    for mine, seen in ((found.highest, before.highest), (found.lowest, before.lowest)):
        expected = (seen[:12].astype(np.float64) - shift) / factor
        np.testing.assert_allclose(mine[:12], expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found.mean, (before.mean - shift) / factor, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.variance, before.variance / factor**2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.origin, -shift / factor, rtol=1e-5, atol=1e-7)


def move_of(plan: Plan, role: str, into: str, choice: Choice) -> Move:
    (move,) = [m for m in plan.moves if m.role == role]
    assert (move.into, move.block) == (into, 0)
    assert move.gain_db == pytest.approx(choice.gain_db, rel=1e-5, abs=1e-6)
    assert move.largest == pytest.approx(choice.factor.max() / choice.factor.min(), rel=1e-5)
    return move


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_norm_keys_and_values(target: str) -> None:
    model = transformer(Choices(packed=target != "openvino"))
    seen, plan = float_model(model, target), equalise(plan_of(model, target=target), BATCHES)
    assert_shapes(plan.model, BATCHES[0])
    signs = seen.target.symmetric_attention
    # The norm: its channels' own middles, which cost nothing
    name = seen.of("norm1")
    low, high = seen.bounds(name)
    choice = choose_factor((high - low) / 2, seen.channels[name].variance, seen.products(name),
                           256, records=seen.records(name))  # fmt: skip
    check(plan, name, seen.channels[name], (low + high) / 2, choice.factor)
    assert plan.exponents[name] == choice.exponent
    move_of(plan, "norm1", "LayerNormalization", choice)
    # k less its middle; q / f and k f
    q, k = seen.of("q"), seen.of("k")
    low, high = seen.bounds(k)
    middle = (low + high) / 2
    less = seen.channels[k].moved(middle, np.ones(len(low)))
    choice = balance(half_of(*seen.bounds(q), signs), half_of(low - middle, high - middle, signs),
                     seen.channels[q].second_moment, less.second_moment, 256)  # fmt: skip
    assert choice.gain_db > 0.1
    check(plan, q, seen.channels[q], np.zeros(len(low)), choice.factor)
    check(plan, k, seen.channels[k], middle, 1 / choice.factor)
    move_of(plan, "q", "k", choice)


@pytest.mark.parametrize(
    ("target", "centre"),
    [("onnxruntime", False), ("openvino", False), ("tensorrt", False), ("tensorrt", True)],
)
def test_values_and_what_attends_to_them(target: str, centre: bool) -> None:
    """(v - mean) / f; v's own rounding counts a fifth. Without its image's mean, v is not moved."""
    model = transformer(Choices())
    seen = float_model(model, target, centre)
    plan = equalise(plan_of(model, target=target, centre_values=centre), BATCHES)
    v, av = seen.of("v"), seen.of("av")
    mean, name = seen.channels[v].mean, v + SUFFIX if centre else v
    shift = 0 * mean if centre else mean
    low, high = seen.bounds(name)
    own = half_of(low - shift, high - shift, seen.target.symmetric_attention)
    low, high = seen.bounds(av)
    attended = half_of(low - mean, high - mean, seen.target.symmetric)
    proj = next(n for n in seen.model.graph if is_linear(n) and "proj" in str(
        find_blocks(seen.model).roles[n.name or ""]))  # fmt: skip
    weight = constant(proj.inputs[1])
    assert weight is not None
    choice = choose_factor(attended, seen.channels[av].variance, [Product(np.abs(weight))], 256,
                           [(own, 0.2)], records=seen.records(av))  # fmt: skip
    assert choice.gain_db > 0.1
    check(plan, av, seen.channels[av], mean, choice.factor)
    check(plan, name, seen.channels[name], shift, choice.factor)
    assert plan.exponents[v] == plan.exponents[av] == choice.exponent
    move_of(plan, "v", "proj", choice)


def mlp(hidden: int, wide: float) -> ir.Model:
    """Two hidden channels are ``wide`` times the others; one of two."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    y = g("LayerNormalization", "x", np.full(WIDTH, 1.5), np.full(WIDTH, 0.1), axis=-1)
    weight = sample(WIDTH, hidden, seed=1) * 0.3
    weight[:, : min(2, hidden // 2)] *= wide
    y = g("Gelu", g("Add", g("MatMul", y, weight), sample(hidden, seed=2)))
    y = g("Add", g("MatMul", y, sample(hidden, WIDTH, seed=3) * 0.3), sample(WIDTH, seed=4))
    model = g.model(g("Add", "x", y))
    fuse(model)
    return model


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize(("hidden", "wide"), [(2, 60.0), (16, 12.0), (128, 40.0)])
def test_hidden_channels(target: str, hidden: int, wide: float) -> None:
    """A Mul in front of fc2, and copies; where codes have a sign an Add, that puts the range of one
    zero point around zero."""
    model = mlp(hidden, wide)
    seen, plan = float_model(model, target), equalise(plan_of(model, target=target), BATCHES)
    assert_shapes(plan.model, BATCHES[0])
    expected = run(model, BATCHES[0])[0]
    error = np.abs(run(plan.model, BATCHES[0])[0] - expected).max()
    assert error < 2e-5 * np.abs(expected).max()
    (name,) = [s.tensor for s in seen.sites.values() if s.role == "gelu"]
    low, high = seen.bounds(name)
    stats, products = seen.channels[name], seen.products(name)
    choice = choose_factor(
        half_of(low, high, False),
        stats.variance,
        products,
        256,
        extra=(16,) if hidden == 128 else (),
        records=seen.records(name),
    )
    factor = choice.factor
    if choice.copies is not None:
        index = np.repeat(np.arange(hidden), choice.copies)
        stats, factor = stats.take(index), (factor * choice.copies)[index]
        weight = products[0].magnitude[index] / choice.copies[index, None]
    else:
        weight = products[0].magnitude
    assert (choice.copies is not None) == (hidden == 128)
    shift, plain = np.zeros(len(factor)), choice.plain
    if seen.target.symmetric:
        power = ((weight * factor[:, None].astype(np.float64)) ** 2).sum(axis=1)
        low_, high_ = shared_range(stats.moved(shift, factor), power, 256, symmetric=False,
                                   exponent=choice.exponent)  # fmt: skip
        step = (high_ - low_) / 255
        shift = factor * step * (128 - np.rint(-low_ / step))
        variance = seen.channels[name].variance
        plain = choose_factor(half_of(low, high, True), variance, products, 256).plain
        assert plain > choice.plain
    made = [
        n for n in plan.model.graph if n.op_type in ("Mul", "Add") and "equalized" in str(n.name)
    ]
    assert [n.op_type for n in made] == (["Mul", "Add"] if shift.any() else ["Mul"])
    new = str(made[-1].outputs[0].name)
    check(plan, new, stats, shift, factor)
    assert plan.exponents[new] == choice.exponent
    if seen.target.symmetric:
        assert plan.fixed[new] == pytest.approx((-128 * step, 127 * step))
    else:
        assert not plan.fixed
    (move,) = [m for m in plan.moves if m.role == "gelu"]
    assert move.copies == (16 if hidden == 128 else 0)
    assert plan.blocks.roles[made[0].name or ""].name == "gelu"
    assert move.gain_db == pytest.approx(10 * np.log10(plain / choice.noise), rel=1e-5)


@pytest.mark.parametrize(
    "options", [{"target": "tensorrt", "precision": "fp8"}, {"weights": 4}], ids=str
)
def test_eight_bit_floats_and_weights_alone_are_only_brought_into_form(
    options: dict[str, object],
) -> None:
    model = transformer(Choices())
    plan = equalise(plan_of(model, **options), BATCHES)
    assert (plan.moves, dict(plan.fixed), dict(plan.exponents)) == ((), {}, {})
    seen = float_model(model, str(options.get("target", "onnxruntime")))
    assert plan.statistics is not None
    for name in (seen.of("norm1"), seen.of("q"), seen.of("av")):
        found = plan.statistics.channels[name]
        np.testing.assert_allclose(found.highest, seen.channels[name].highest, rtol=1e-5)


def test_the_last_norm_s_statistics_move_where_the_head_reads_it() -> None:
    """Behind a Gather: the tensor that the linear reads, by the norm's shift and factor."""
    model = transformer(Choices())
    seen, plan = float_model(model, "onnxruntime"), equalise(plan_of(model), BATCHES)
    (move,) = [m for m in plan.moves if m.block is None]
    name = move.tensor
    low, high = seen.bounds(name)
    choice = choose_factor(
        (high - low) / 2,
        seen.channels[name].variance,
        seen.products(name),
        256,
        records=seen.records(name),
    )
    check(plan, name, seen.channels[name], (low + high) / 2, choice.factor)


def test_a_norm_that_is_read_twice() -> None:
    """All tokens by one linear, the first by another: both tensors' statistics are the new ones."""
    g = SmallGraph(("batch", TOKENS, WIDTH))
    y = g("LayerNormalization", "x", np.full(WIDTH, 1.5), np.full(WIDTH, 0.1), axis=-1)
    every = g("Add", g("MatMul", y, sample(WIDTH, 3, seed=1)), sample(3, seed=2))
    first = g("Gather", y, np.array(0), axis=1)
    model = g.model(every, g("Add", g("MatMul", first, sample(WIDTH, 3, seed=3)), sample(3)))
    fuse(model)
    plan = equalise(plan_of(model), BATCHES)
    assert plan.statistics is not None
    found = {s.tensor for s in plan.sites.values()} & plan.statistics.channels.keys()
    assert len(found) == 2
    probe = plan.model.clone()
    values = [v for n in probe.graph for v in n.outputs if v.name in found]
    probe.graph.outputs.extend(values)
    seen = [run(probe, batch)[2:] for batch in BATCHES]
    for index, value in enumerate(values):
        rows = np.concatenate([s[index].reshape(-1, WIDTH) for s in seen])
        stats = plan.statistics.channels[str(value.name)]
        np.testing.assert_allclose(stats.highest[0], rows.max(axis=0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(stats.mean, rows.mean(axis=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("place", ["values", "attended"])
def test_values_stay_where_something_else_reads_them(target: str, place: str) -> None:
    """Them, or what attends to them: the factors would have to come out again in front of it."""
    model = transformer(Choices(packed=False))
    (soft,) = (n for n in model.graph if n.op_type == "Softmax")
    attended = next(iter(soft.outputs[0].uses())).node.outputs[0]
    if place == "values":
        attended = attended.producer().inputs[1]  # type: ignore[union-attr,assignment]
    other = ir.node("Neg", [attended], num_outputs=1, name="other")
    other.outputs[0].name = "other"
    other.outputs[0].type, other.outputs[0].shape = attended.type, attended.shape
    model.graph.append(other)
    model.graph.outputs.append(other.outputs[0])
    x = sample(2, TOKENS, WIDTH, seed=8)
    before = run(to_standard(model), x)
    plan = equalise(plan_of(model, target=target), BATCHES)
    assert "v" not in {move.role for move in plan.moves}
    assert "q" in {move.role for move in plan.moves}
    for found, expected in zip(run(to_standard(plan.model), x), before, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
