"""Factors of tensors between convolutions on codes: what they divide, and that nothing else
changes, for every way in which such a tensor is made."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from small_graph import SmallGraph, run, sample

from ptq_onnx.blocks.regions import find_regions
from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import consumers
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization.by_quantizer import rewritten
from ptq_onnx.equalization.gates import (
    Gated,
    Plain,
    Source,
    choose_factors,
    in_steps,
    sources,
)
from ptq_onnx.equalization.restructure import in_form
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.graph.expansions import to_standard
from ptq_onnx.quantizers.base import Plan

WIDE, SIDE = 64, 12
X = sample(2, WIDE, SIDE, SIDE, seed=1) * 3
FACTOR = np.exp2(np.random.default_rng(3).uniform(-2, 2, WIDE))


def conv(g: SmallGraph, x: str, seed: int, groups: int = 1) -> str:
    inside, side = (WIDE, 1) if groups == 1 else (1, 3)
    weight = sample(WIDE, inside, side, side, seed=seed) / (side * np.sqrt(inside))
    bias = sample(WIDE, seed=seed + 50)
    return g("Conv", x, weight, bias, pads=[side // 2] * 4, group=groups)


def behind(g: SmallGraph, x: str, pool: bool = True) -> str:
    """A sum, perhaps a pool, and two convolutions that take a factor in."""
    x = g("Add", x, np.array(0.3))
    x = g("MaxPool", x, kernel_shape=[2, 2], strides=[1, 1]) if pool else x
    y = conv(g, conv(g, x, 6, WIDE), 7)
    return conv(g, conv(g, g("Add", conv(g, x, 5), y), 9), 10)


def excited(g: SmallGraph, x: str) -> str:
    y = g("Relu", conv(g, x, 2))
    gate = g("HardSigmoid", conv(g, g("GlobalAveragePool", y), 3))
    return behind(g, g("Mul", y, gate), False)


def through_a_gate(g: SmallGraph, x: str) -> str:
    """The factor of a convolution's output passes a number for each channel and image."""
    gate = g("HardSigmoid", conv(g, g("GlobalAveragePool", "x"), 3))
    return behind(g, g("Mul", conv(g, x, 2), gate), False)


NETWORKS: dict[str, tuple[Callable[[SmallGraph], str], str]] = {
    "plain": (lambda g: behind(g, conv(g, "x", 2)), "the convolutions behind"),
    "relu": (lambda g: behind(g, g("Relu", conv(g, "x", 2))), "the convolutions behind"),
    "gated": (
        lambda g: behind(g, g("HardSwish", conv(g, conv(g, "x", 1), 2)), False),
        "the gate and the convolutions behind",
    ),
    "excited": (
        lambda g: excited(g, conv(g, "x", 1)),
        "the small gate and the convolutions behind",
    ),
    "through a gate": (lambda g: through_a_gate(g, "x"), "the convolutions behind"),
    "entering": (lambda g: behind(g, conv(g, g("Tanh", "x"), 2)), "Mul"),
}


COUNTS = {"plain": 3, "relu": 3, "gated": 1, "excited": 1, "through a gate": 3, "entering": 1}
"""Of the tensors that are made so, those that convolutions alone read, be it behind other ops."""


def plan_of(name: str) -> Plan:
    g = SmallGraph(("batch", WIDE, SIDE, SIDE))
    model = g.model(NETWORKS[name][0](g))
    fuse(model)
    blocks = find_blocks(model)
    config = QuantizeConfig(quantizer="deploy", threads=1)
    return Plan(model, blocks, find_sites(model, blocks), config)


def formed(name: str) -> ir.Model:
    return in_form(plan_of(name)).model


def tensors(model: ir.Model) -> dict[str, np.ndarray]:
    copy = to_standard(model)
    made = [v for node in copy.graph for v in node.outputs]
    copy.graph.outputs[:] = made
    return dict(zip([str(v.name) for v in made], run(copy, X), strict=True))


def found_in(model: ir.Model, name: str) -> list[Source]:
    return [s for s in sources(find_regions(model.graph)) if s.name == NETWORKS[name][1]]


@pytest.mark.parametrize("name", NETWORKS)
def test_only_what_is_named_is_divided(name: str) -> None:
    count = len(found_in(formed(name), name))
    assert count == COUNTS[name]
    for place in range(count):
        model = formed(name)
        before = tensors(model)
        one = found_in(model, name)[place]
        factor = in_steps(FACTOR) if isinstance(one, Gated) else FACTOR
        made, readers = [str(v.name) for v in one.made], set(one.carried.readers)
        new = one.divide(model.graph, factor)
        one.carried.take_in(model.graph, factor)
        after = tensors(model)
        last = str(model.graph.outputs[0].name)
        np.testing.assert_allclose(
            after[last], before[last], atol=2e-5 * np.abs(before[last]).max()
        )
        divided = {**dict.fromkeys(made, ""), **new}
        if isinstance(one, Plain):
            divided[str(one.convolution.outputs[0].name)] = ""  # in front of a Relu
        if name == "entering":
            divided = {**new, **dict.fromkeys(made[1:], "")}
        for tensor, old in divided.items():
            expected = before[old or tensor] / factor.reshape(-1, 1, 1)
            np.testing.assert_allclose(
                after[tensor], expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max()
            )
        others = before.keys() & after.keys() - divided.keys()
        for tensor in others - {str(n.outputs[0].name) for n in readers}:
            if before[tensor].shape == after[tensor].shape:
                size = np.abs(before[tensor]).max()
                same = np.abs(after[tensor] - before[tensor]).max() <= 2e-5 * size
                assert same or isinstance(one, Gated), tensor
        assert all(node.op_type == "Conv" for node in readers)
        assert one.costs == (name == "entering")


def test_where_a_gate_is_shut_and_how_steep_it_is_open() -> None:
    """HardSwish, written on u / √6: zero below -3, and u above 3."""
    model = formed("gated")
    (one,) = found_in(model, "gated")
    assert isinstance(one, Gated)
    assert one.least == pytest.approx(-3 / np.sqrt(6))
    product = str(one.made[1].name)
    values = tensors(model)
    u, made = values[str(one.value.name)], values[product]
    assert np.abs(made[u < one.least]).max(initial=0) < 1e-5
    wide = u > -one.least
    np.testing.assert_allclose(made[wide], one.slope * u[wide], rtol=1e-5)
    assert wide.any()
    assert (u < one.least).any()


def test_factors_in_steps_are_whole_parts_of_the_largest() -> None:
    """n/255 of it, the nearest n, and 1 where that would be 0."""
    found = in_steps(np.array([5.1, 2.55, 0.031, 0.001, 0.0]))
    np.testing.assert_allclose(found, np.array([255, 128, 2, 1, 1]) * 5.1 / 255, rtol=1e-12)


def test_where_each_convolution_reads_its_own_channel_all_ranges_become_one() -> None:
    """Of the widest of what is read and made; what one scale loses before and then, Σ range²."""
    half, made = np.array([1.0, 4.0, 0.5]), [np.array([2.0, 1.0, 0.5]), np.array([0.1, 0.1, 8.0])]
    widest = np.array([2.0, 4.0, 8.0])
    found = choose_factors(half, made, np.ones(3), [], 256)
    np.testing.assert_allclose(found.factor, widest / 4)  # of geometric mean one
    assert found.plain == pytest.approx(3 * 8.0**2)
    assert found.noise == pytest.approx(np.sum(widest**2))
    assert found.gain_db == pytest.approx(10 * np.log10(192 / 84))
    assert found.exponent == 1.0
    assert found.copies is None


@pytest.mark.parametrize("name", ["plain", "gated"])
def test_every_tensor_in_a_network_has_its_factor(name: str) -> None:
    """Those that cost no op of floats, in the order of the data."""
    plan = rewritten(plan_of(name), [X])
    found = [s for s in sources(find_regions(formed(name).graph)) if not s.costs]
    assert [move.into for move in plan.moves] == [one.name for one in found]
    before, after = (run(m, X)[0] for m in (plan_of(name).model, plan.model))
    np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())


def test_a_tensor_that_something_else_reads_is_none() -> None:
    """Nor is one that is an output, nor one that a convolution of computed weights reads."""
    for name in ("gated", "plain", "entering"):
        model = formed(name)
        one = found_in(model, name)[0]
        model.graph.outputs.append(one.value)
        left = [str(s.value.name) for s in found_in(model, name)]
        assert str(one.value.name) not in left, name


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"convolutions": False}, True), ({"target": "tensorrt"}, False)],
)
def test_what_a_concat_joins_is_a_site_in_onnx_runtime_too(
    options: dict[str, object], expected: bool
) -> None:
    """Its only integer convolution gives codes; elsewhere only what the Concat makes is one."""
    g = SmallGraph(("batch", WIDE, SIDE, SIDE))
    model = g.model(g("Relu", g("Concat", conv(g, "x", 1), conv(g, "x", 2), axis=1)))
    blocks = find_blocks(model)
    config = QuantizeConfig(quantizer="deploy", threads=1, **options)  # type: ignore[arg-type]
    plan = in_form(Plan(model, blocks, find_sites(model, blocks), config))
    made = {str(n.outputs[0].name) for n in model.graph if n.op_type == "Conv"}
    assert made & plan.sites.keys() == (made if expected else set())
    assert len(made) == 2


def test_what_floats_make_and_read_is_divided_in_a_mul() -> None:
    """Behind a convolution whose codes become floats, and behind a Concat of floats; not behind a
    Transpose, which may have moved the channels."""

    def part(moved: bool) -> ir.Model:
        g = SmallGraph(("batch", WIDE, SIDE, SIDE))
        x = conv(g, conv(g, "x", 1), 2)
        y = g("Transpose", g("Gelu", x), perm=[0, 1, 3, 2]) if moved else g("Gelu", x)
        halves = sample(WIDE, 2 * WIDE, 1, 1, seed=3) / WIDE**0.5
        y = g("Conv", g("Concat", y, g("Erf", y), axis=1) if not moved else y,
              halves[:, :WIDE] if moved else halves)  # fmt: skip
        model = g.model(conv(g, y, 4))
        fuse(model)
        return model

    for moved in (False, True):
        found = {type(one).__name__: one for one in sources(find_regions(part(moved).graph))}
        assert found.keys() == {"Plain", "Leaving"} | ({"Entering"} if not moved else set())
    model = part(False)
    expected = run(to_standard(model), X)[0]
    for one in sources(find_regions(model.graph)):
        if one.name.startswith("Mul"):
            size = one.value.shape[1] if one.value.shape is not None else 0
            factor = np.exp2(np.random.default_rng(3).uniform(-2, 2, int(size)))
            one.divide(model.graph, factor)
            one.carried.take_in(model.graph, factor)
    muls = [n for n in model.graph if n.op_type == "Mul"]
    assert len(muls) == 2
    np.testing.assert_allclose(run(to_standard(model), X)[0], expected, rtol=1e-3, atol=1e-4)


def test_the_mul_stands_in_front_of_all_that_read_it() -> None:
    """The readers of a tensor are in no order: here the last that runs is the first of them."""
    g = SmallGraph(("batch", WIDE, SIDE, SIDE))
    x = conv(g, conv(g, "x", 1), 2)
    y = g("Add", g("Gelu", x), g("Erf", x))
    model = g.model(g("Add", conv(g, conv(g, y, 3), 4), conv(g, conv(g, y, 5), 6)))
    fuse(model)
    expected = run(to_standard(model), X)[0]
    found = [
        one
        for one in sources(find_regions(model.graph))
        if one.name.startswith("Mul") and len(list(consumers(one.value))) == 2
    ]
    assert {type(one).__name__ for one in found} == {"Leaving", "Entering"}
    for one in found:
        first = next(n for n in model.graph if n in {node for node, _ in consumers(one.value)})
        first.replace_input_with(0, model.graph.inputs[0])
        first.replace_input_with(0, one.value)
        assert next(iter(consumers(one.value)))[0] is not first
        one.divide(model.graph, FACTOR)
        one.carried.take_in(model.graph, FACTOR)
    np.testing.assert_allclose(run(to_standard(model), X)[0], expected, rtol=1e-3, atol=1e-4)
