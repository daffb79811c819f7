"""Tensors between convolutions: which have factors worth their op, and which have sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run, sample
from test_known_gates import SIDE, WIDE, X, behind, conv, plan_of

from ptq_onnx.blocks.regions import find_regions
from ptq_onnx.blocks.roles import Role, find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import consumers, name_of
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization.by_quantizer import rewritten
from ptq_onnx.equalization.code_forms import sites_of
from ptq_onnx.equalization.convolution_steps import ConvolutionSteps
from ptq_onnx.equalization.gates import Gated, Plain, sources
from ptq_onnx.equalization.restructure import in_form
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.numerics.ptf import least_steps
from ptq_onnx.quantizers.base import Move, Plan

ALIKE = [
    np.random.default_rng(seed)
    .permuted(np.broadcast_to(np.linspace(-3, 3, SIDE**2, dtype=np.float32), (2, WIDE, SIDE**2)),
              axis=2)
    .reshape(2, WIDE, SIDE, SIDE)
    for seed in range(2)
]  # fmt: skip
"""Images each of whose channels has the same values, in another order."""


def built(part: Callable[[SmallGraph], str]) -> ir.Model:
    g = SmallGraph(("batch", WIDE, SIDE, SIDE))
    model = g.model(part(g))
    fuse(model)
    return model


def spread_out(spread: float, op: str) -> ir.Model:
    """What an op makes of channels up to 2^spread apart, and convolutions behind it: GELU is one of
    floats, Relu is not."""

    def part(g: SmallGraph) -> str:
        weight = np.zeros((WIDE, WIDE, 1, 1), np.float32)
        weight[np.arange(WIDE), np.arange(WIDE), 0, 0] = np.exp2(spread * np.linspace(0, 1, WIDE))
        reading = np.sign(sample(WIDE, WIDE, 1, 1, seed=2)) / 8
        return behind(g, g("Conv", g(op, g("Conv", "x", weight)), reading))

    return built(part)


def moves(model: ir.Model) -> list[Move]:
    config = QuantizeConfig(quantizer="deploy", threads=1)
    blocks = find_blocks(model)
    plan = Plan(model, blocks, find_sites(model, blocks), config)
    found = rewritten(plan, ALIKE)
    expected = run(model, X)[0]
    np.testing.assert_allclose(run(found.model, X)[0], expected, atol=2e-5 * np.abs(expected).max())
    return [move for move in found.moves if isinstance(move, Move)]


@pytest.mark.parametrize("spread", [0.0, 0.25, 0.5, 1.0, 4.0])
def test_a_mul_must_save_half_a_decibel(spread: float) -> None:
    """What costs no op is moved in any case, be it behind one that is not worth its own."""
    found = moves(spread_out(spread, "Gelu"))
    # What the convolution gives to GELU, which begins at -4.5: every channel is rounded as its own
    # range has it, with the zero that serves all of them best
    high = 3 * np.exp2(spread * np.linspace(0, 1, WIDE))
    _, ranges = least_steps(-np.minimum(high, 4.5), high, (0, 255), symmetric=False)
    gain = 10 * np.log10(ranges.max() ** 2 / np.mean(ranges**2))
    leaves = [move for move in found if move.into == "Mul behind"]
    assert [move.gain_db for move in leaves] == pytest.approx([gain] if gain >= 0.5 else [], 0.01)
    found = [move for move in found if move not in leaves]
    worth = spread >= 0.5  # 0.549 dB there, and 1.05 and 3.7
    assert [move.into for move in found] == ["Mul"] * worth + ["the convolutions behind"] * 3
    if worth:
        assert found[0].gain_db == pytest.approx({0.5: 0.549, 1.0: 1.049, 4.0: 3.71}[spread], 0.01)
    found = moves(spread_out(spread, "Relu"))
    assert [move.into for move in found] == ["the convolutions behind"] * 4
    assert (found[0].gain_db < 0.5) == (spread < 0.5)


def gated(g: SmallGraph, near: str) -> str:
    """u · clip(u + 1.2, 0, 2.4), or nearly so."""
    u = conv(g, "x", 1)
    moved = g("Add", u, conv(g, "x", 3) if near == "two tensors" else np.array(1.2))
    clipped = g("Clip", moved, np.array(0.0), np.array(2.4))
    made = g("Mul", clipped if near == "another product" else u, clipped)
    y = behind(g, made, False)
    other = {"a third reader": u, "the sum": moved, "the gate": clipped, "another product": u}
    if near in other:
        y = g("Add", y, conv(g, other[near], 4))
    if near == "a pool":
        pooled = g("MaxPool", u, kernel_shape=[1, 1], strides=[1, 1])
        y = g("Add", y, conv(g, pooled, 4))
    return y


@pytest.mark.parametrize(
    "near",
    [
        "",
        "a third reader",
        "a pool",
        "the sum",
        "the gate",
        "two tensors",
        "another product",
        "output",
    ],
)
def test_a_gate_is_a_clipped_sum_of_what_it_multiplies(near: str) -> None:
    """That nothing else reads, and both nothing but they."""
    model = built(lambda g: gated(g, near))
    u = next(n for n in model.graph if n.op_type == "Conv").outputs[0]
    if near == "output":
        model.graph.outputs.append(u)
    found = sources(find_regions(model.graph))
    assert [s.value for s in found if isinstance(s, Gated)] == ([] if near else [u])
    assert [s.value for s in found if s.value is u] == ([] if near else [u])
    if not near:
        carried = found[0].carried
        assert [len(carried.sums), len(carried.readers)] == [1, 2]  # a constant that is added


@pytest.mark.parametrize(
    ("op", "takes"),
    [("MaxPool", True), ("AveragePool", True), ("Sigmoid", False), ("LeakyRelu", False),
     ("tensor", False), ("twice", False), ("output", False)],
)  # fmt: skip
def test_what_a_factor_passes(op: str, takes: bool) -> None:
    """Pools; no other op, and no sum with another tensor."""

    def part(g: SmallGraph) -> str:
        y = conv(g, "x", 2)
        pool = {"kernel_shape": [1, 1], "strides": [1, 1]} if "Pool" in op else {}
        if op == "tensor":
            y = g("Add", y, conv(g, "x", 3))
        elif op == "twice":
            y = g("Mul", y, y)
        elif op != "output":
            y = g(op, y, **pool)
        return conv(g, conv(g, y, 5), 6)

    model = built(part)
    first, second = [n for n in model.graph if n.op_type == "Conv"][:2]
    value = first.outputs[0]
    if op == "output":
        model.graph.outputs.append(value)
    regions = find_regions(model.graph)
    assert {first, second} <= regions.convolutions
    found = [s for s in sources(regions) if s.value is value]
    assert len(found) == int(takes)
    for one in found:
        assert isinstance(one, Plain)
        assert one.carried.readers == [second]
        assert one.carried.sums == []


def test_codes_and_the_numbers_of_their_forms_are_sites() -> None:
    """Those too that no op of the model as it came reads or makes."""
    plan = in_form(plan_of("gated"))
    regions, roles = find_regions(plan.model.graph), plan.blocks.roles
    found = {str(v.name): v for v in (*regions.codes, *regions.constants)}
    sites = {name: plan.sites[name] for name in found}
    numbers = [s for s in sites.values() if s.is_parameter]
    assert [s.tensor for s in numbers] == [str(v.name) for v in regions.constants]
    assert {s.role for s in numbers} == {"number", "pos_embed"}  # of HardSwish, and of the model
    for site in sites.values():
        value = found[site.tensor]
        node = value.producer()
        assert site.producer == (None if node is None else name_of(node))
        if node is not None:
            role = roles.get(name_of(node))
            assert (site.role, site.block) == (
                ("other", None) if role is None else (role.name, role.block)
            )
            assert site.channel_axes == (1,)
            assert site.shape == ("batch", WIDE, SIDE, SIDE)
        if site.role == "number":
            assert site.consumers == tuple(name_of(n) for n, _ in consumers(value))
            assert (site.channel_axes, site.shape, site.block) == ((), (), None)


def joined(g: SmallGraph) -> str:
    both = g("Concat", conv(g, "x", 1), g("Relu", conv(g, "x", 2)), axis=1)
    return g("Relu", g("Conv", both, sample(WIDE, 2 * WIDE, 1, 1, seed=3) / 16))


@pytest.mark.parametrize("numbers", [True, False])
def test_sites_are_named_after_what_makes_them(numbers: bool) -> None:
    """What a Concat joins; and numbers after what reads them."""
    if numbers:
        plan = plan_of("gated")
    else:
        model, config = built(joined), QuantizeConfig(quantizer="deploy", threads=1)
        plan = Plan(model, find_blocks(model), {}, config)
    plan = in_form(plan)
    regions, nodes = find_regions(plan.model.graph), list(plan.model.graph)
    roles = {name_of(node): Role(place, f"role{place}") for place, node in enumerate(nodes)}
    blocks = replace(plan.blocks, roles=roles)
    plain = find_sites(plan.model, blocks)
    found = sites_of(plan.model, blocks, plan.config)
    extra = {str(v.name): v for v in (*regions.codes, *regions.constants) if v.name not in plain}
    assert found.keys() == plain.keys() | extra.keys()
    assert {found[name].is_parameter for name in extra} == {numbers}
    for name, value in extra.items():
        node, site = value.producer(), found[name]
        first = next(n for n, _ in consumers(value))
        named = roles[name_of(first if node is None else node)]
        assert site.block == named.block
        assert site.role == ("number" if numbers else named.name)
        assert site.channel_axes == (() if numbers else (1,))


def test_the_magnitudes_that_read_a_channel() -> None:
    """Of every output and pixel, by input channel."""
    weight = sample(5, 3, 2, 2, seed=4)
    g = SmallGraph(("batch", 3, 6, 6))
    model = g.model(g("Conv", "x", weight))
    steps = ConvolutionSteps()
    steps.weight_bits = 6
    (found,) = steps.of_convolutions(model.graph)
    assert (found.magnitude.shape, found.bits) == ((3, 20), 6)
    for channel in range(3):
        expected = np.sort(np.abs(weight[:, channel]).ravel())
        np.testing.assert_array_equal(np.sort(found.magnitude[channel]), expected)
