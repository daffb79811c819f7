"""The differentiable form: the simulator's numbers, and gradients that follow from the formulas."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from prepared_models import images, quantized
from small_graph import SmallGraph, run, sample
from small_transformer import Choices, transformer

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.spans import spans_of
from ptq_onnx.blocks.walking import is_layout, name_of
from ptq_onnx.engine.learned import Learned
from ptq_onnx.engine.output_weights import EVENLY, Weights, even, output_weights
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.engine.straight_through import Rounding, knows
from ptq_onnx.engine.torch_form import TorchForm
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.around.token_mean import TokenMean
from ptq_onnx.numerics.codes.logarithmic import Logarithmic
from ptq_onnx.numerics.fake_quantize import fake_quantize
from ptq_onnx.numerics.spec import Rule, TensorSpec
from ptq_onnx.quantizers.base import SiteQuantizer
from ptq_onnx.quantizers.reconstruction import float_weights


def spec_of(rule: Rule, scale: float, zero: int = 0, **details: int) -> TensorSpec:
    return TensorSpec("x", rule, np.float32(scale), np.int32(zero), details=details)


@cache
def lowbit(bits: str = "4/4/4") -> SiteQuantizer:
    return quantized(quantizer="lowbit", bits=bits)


SPECS = {
    "uniform": spec_of(Rule(4, False, False), 0.25, 6),
    "signed": spec_of(Rule(4), 0.3),
    "relative to the row": spec_of(Rule(8, False, False, around=(RowMaximum(),)), 1 / 255),
    "logarithmic": spec_of(Rule(4, False, False, code=Logarithmic()), 2.0, 11, eighths=16),
}


@pytest.mark.parametrize("name", list(SPECS))
def test_it_rounds_as_numpy_does(name: str) -> None:
    x = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    x = abs(x) if "row" in name else x
    found = Rounding(SPECS[name])(torch.from_numpy(x), torch.tensor(float(SPECS[name].scale)))
    np.testing.assert_allclose(found.numpy(), fake_quantize(x, SPECS[name]), atol=1e-6)


def test_gradients_pass_inside_the_range_and_tell_the_step() -> None:
    """Of s·clip(round(x / s) + 6, 0, 15) - 6s by s: r - x/s inside, the end's code outside."""
    x = torch.tensor([0.3, -0.4, 100.0, -100.0], requires_grad=True)
    step = torch.tensor(0.25, requires_grad=True)
    Rounding(SPECS["uniform"])(x, step).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert step.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0]
    assert float(step.grad) == pytest.approx((1 - 1.2) + (-2 + 1.6) + 9 - 6, abs=1e-5)


def test_what_it_does_not_know() -> None:
    assert not knows(Rule(around=(TokenMean(),)))
    assert all(knows(spec.rule) for spec in SPECS.values())


@pytest.mark.parametrize("bits", ["4/4/4", "4/8/8"])
def test_it_is_the_simulator_node_by_node(bits: str) -> None:
    """Fed the simulator's inputs, to 1e-5 of the size; but for one in a thousand values, which lie
    at the middle between two codes."""
    quantizer, x = lowbit(bits), images()[:4]
    nodes = list(quantizer.model.graph)
    made = [str(v.name) for node in nodes for v in node.outputs if node.op_type != "Shape"]
    values = Simulator(quantizer.model, quantizer, threads=1).run(x, made)
    values[str(quantizer.model.graph.inputs[0].name)] = x
    compared = 0
    for node in nodes:
        name = str(node.outputs[0].name)
        if is_layout(node) or node.op_type == "Softmax" or name not in values:
            continue
        form = TorchForm([*_late(node, quantizer.specs), node], quantizer.specs)
        assert form.missing() is None
        feeds = {n: torch.from_numpy(np.array(values[n])) for n in form.inputs}
        with torch.no_grad():
            found = form.run(feeds, [name])[name].numpy()
        off = abs(found - values[name]) > 1e-5 * np.abs(values[name]).max()
        assert off.mean() <= 1e-3, name_of(node)
        compared += 1
    assert compared > 60


def _late(node: ir.Node, specs: dict[str, TensorSpec]) -> list[ir.Node]:
    """Nodes before it whose output it quantizes, not they."""
    before = [v.producer() for v in node.inputs if v is not None and str(v.name) in specs]
    return [n for n in before if n is not None and (is_layout(n) or n.op_type == "Softmax")]


IMAGE = (2, 4, 6, 6)
OPS_ALONE: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "AveragePool": ([], {"kernel_shape": [3, 2], "strides": [2, 2]}),
    "BatchNormalization": ([sample(4), sample(4), sample(4), sample(4) ** 2 + 0.1], {}),
    "Clip": ([np.array(-0.5, np.float32), np.array(0.7, np.float32)], {}),
    "Conv": (
        [sample(8, 2, 3, 3), sample(8)],
        {"group": 2, "pads": [1, 0, 0, 1], "strides": [2, 1], "dilations": [1, 2]},
    ),
    "Abs": ([], {}),
    "ConvTranspose": (
        [sample(4, 3, 3, 2), sample(6)],
        {"group": 2, "pads": [1, 0, 1, 0], "strides": [2, 1], "output_padding": [1, 0]},
    ),
    "Cos": ([], {}),
    "Neg": ([], {}),
    "Sin": ([], {}),
    "Einsum": ([sample(6, 5)], {"equation": "bchw,wn->bnch"}),
    "Exp": ([], {}),
    "GlobalAveragePool": ([], {}),
    "HardSigmoid": ([], {"alpha": 1 / 6, "beta": 0.5}),
    "HardSwish": ([], {}),
    "MaxPool": ([], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "Pad": ([np.array([0, 0, 1, 2, 0, 0, 0, 1])], {}),
    "Sigmoid": ([], {}),
    "Tanh": ([], {}),
    "Tile": ([np.array([1, 2, 1, 3])], {}),
}


@pytest.mark.parametrize("kind", list(OPS_ALONE))
def test_ops_are_those_of_onnxruntime(kind: str) -> None:
    """In numbers; and that a gradient passes."""
    more, attributes = OPS_ALONE[kind]
    g = SmallGraph(IMAGE)
    agrees(g, g(kind, "x", *more, **attributes))


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [0, 1, 1, 0], "strides": [2, 2]},
        {"pads": [2, 0, 0, 1], "dilations": [2, 1]},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
        {"strides": [2, 2], "output_shape": [12, 12]},
    ],
)
def test_pads_of_a_transposed_convolution(attributes: dict[str, Any]) -> None:
    g = SmallGraph(IMAGE)
    agrees(g, g("ConvTranspose", "x", sample(4, 5, 3, 3), **attributes))


RESIZES: list[tuple[dict[str, Any], list[float] | None, list[int] | None]] = [
    ({"mode": "linear"}, [1, 1, 2.5, 1.5], None),
    ({"mode": "linear"}, None, [2, 4, 9, 13]),
    (
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        None,
        [2, 4, 11, 9],
    ),
    ({"mode": "cubic", "cubic_coeff_a": -0.75}, None, [2, 4, 15, 8]),
    (
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        [1, 1, 2, 3],
        None,
    ),
]


@pytest.mark.parametrize(("attributes", "scales", "shape"), RESIZES)
def test_resizes_are_those_of_onnxruntime(
    attributes: dict[str, Any], scales: list[float] | None, shape: list[int] | None
) -> None:
    g = SmallGraph(IMAGE)
    told = [np.array(scales, np.float32)] if scales else ["", np.array(shape)]
    agrees(g, g("Resize", "x", "", *told, **attributes))


@pytest.mark.parametrize(
    "attributes",
    [
        {"mode": "nearest"},
        {"mode": "linear", "antialias": 1},
        {"mode": "cubic", "cubic_coeff_a": -0.5},
        {"mode": "linear", "coordinate_transformation_mode": "asymmetric"},
    ],
)
def test_other_resizes_are_named(attributes: dict[str, Any]) -> None:
    g = SmallGraph(IMAGE)
    model = g.model(g("Resize", "x", "", "", np.array([2, 4, 12, 12]), **attributes))
    reason = TorchForm(model.graph, {}).missing()
    assert reason is not None
    assert reason.endswith("no Resize of this form in torch")


def test_masks_are_those_of_onnxruntime() -> None:
    g = SmallGraph(IMAGE)
    above = g("Not", g("Greater", "x", np.array(0.3)))
    agrees(g, g("Where", above, g("Sqrt", g("Exp", "x")), np.array(2.0)))


def agrees(g: SmallGraph, made: str) -> None:
    model = g.model(made)
    x = np.random.default_rng(0).normal(size=IMAGE).astype(np.float32)
    form = TorchForm(model.graph, {})
    assert form.missing() is None
    fed = torch.from_numpy(x).requires_grad_()
    (found,) = form.run({"x": fed}, [made]).values()
    (expected,) = run(model, x)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert fed.grad is not None
    assert float(fed.grad.abs().sum()) > 0.1


def test_a_weight_that_is_no_linears_is_not_learned() -> None:
    g = SmallGraph(IMAGE)
    model = g.model(g("Conv", "x", sample(8, 4, 1, 1)))
    weight = str(next(iter(model.graph)).inputs[1].name)
    spec = spec_of(Rule(8), 0.1)
    reason = TorchForm(model.graph, {weight: spec}).missing()
    assert reason is not None
    assert reason.endswith(": a weight with codes that is no linear's")


def test_nothing_learned_is_the_closed_form() -> None:
    """Codes start on the side that the float weight says, and round to those of GPTQ; half of a
    way is half of it."""
    quantizer = lowbit()
    form = TorchForm(quantizer.model.graph, quantizer.specs)
    before, steps = dict(form.constants), dict(form.scales)
    learned = Learned(form, float_weights(quantizer.plan.model.graph))
    learned.go(1.0)
    constants, changed = learned.found()
    assert form.codes
    for name in form.codes:
        np.testing.assert_allclose(constants[name], before[name].numpy(), atol=1e-6)
    assert all(np.array_equal(changed[name], steps[name].numpy()) for name in changed)
    for one in learned._all:
        with torch.no_grad():
            one.parameter.add_(0.1)
    found = {}
    for part in (0.5, 1.0):
        learned.go(part)
        found[part] = learned.found()[1]
    for name, step in changed.items():
        np.testing.assert_allclose(found[0.5][name], step * np.exp(0.05), rtol=1e-5)
        np.testing.assert_allclose(found[1.0][name], step * np.exp(0.1), rtol=1e-5)


def test_what_others_read_is_not_learned() -> None:
    """A norm's γ that two blocks share belongs to neither."""
    model = transformer(Choices(), 2)
    spans = [s for s in spans_of(model.graph, find_blocks(model)) if s.blocks]
    norms = [n for n in spans[0].nodes if n.op_type == "LayerNormalization"]
    other = next(n for n in spans[1].nodes if n.op_type == "LayerNormalization")
    before = {one.name for one in Learned(TorchForm(spans[0].nodes, {}), {})._all}
    shared = str(norms[0].inputs[1].name)
    assert shared in before
    other.replace_input_with(1, norms[0].inputs[1])
    after = {one.name for one in Learned(TorchForm(spans[0].nodes, {}), {})._all}
    assert before - after == {shared}


def test_errors_weigh_what_they_cost_the_output() -> None:
    """The head reads the first token alone: all weight is there, but for the part of all."""
    graph = transformer(Choices(), 1).graph
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 6, 8)).astype(np.float32))
    form = TorchForm(graph, {})
    normed = [n for n in graph if n.op_type == "LayerNormalization"][-1]
    stream = str(normed.inputs[0].name)
    (feed,) = form.inputs
    weights = output_weights(form, feed, [stream], [str(graph.outputs[0].name)], [x, x])[stream]
    one = [6 * (1 - EVENLY) + EVENLY, *[EVENLY] * 5]
    np.testing.assert_allclose(weights.positions.numpy(), one, rtol=1e-5)
    gram = weights.root @ weights.root.T
    assert float(gram.diagonal().mean()) == pytest.approx(1.1, abs=1e-5)
    # A norm takes out what all channels share.
    assert float(weights.loss(torch.ones(1, 6, 8))) < 0.2 * float(even(x).loss(torch.ones(1, 6, 8)))


def test_even_weights_are_the_mean_square() -> None:
    error = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    weights: Weights = even(error)
    assert float(weights.loss(error)) == pytest.approx(float((error**2).mean()), abs=1e-6)
