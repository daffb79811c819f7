"""Convolutions on codes in ``deploy``: what is decided, the file's kernels, and its numbers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from small_graph import SmallGraph, run, sample

import ptq_onnx
from ptq_onnx.blocks import region_costs
from ptq_onnx.blocks.regions import MORE, _Finder, decide, find_regions
from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.equalization.by_quantizer import rewritten
from ptq_onnx.equalization.restructure import in_form
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.graph.expansions import standardise
from ptq_onnx.pipeline import lossy_regions
from ptq_onnx.preparation.model_files import save, serialize
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer
from ptq_onnx.quantizers.code_regions import least
from ptq_onnx.quantizers.solved_specs import LARGEST_BIAS
from ptq_onnx.targets.checking.check import check
from ptq_onnx.targets.checking.optimised import optimised_histogram

WIDE, SIDE = 64, 12
LEVELS = np.exp2(np.random.default_rng(9).uniform(-4, 2, WIDE)).astype(np.float32)
ONES = np.ones(WIDE, np.float32)
BATCHES = [sample(2, WIDE, SIDE, SIDE, seed=s) for s in range(4)]


def conv(
    g: SmallGraph,
    x: str,
    seed: int,
    *,
    groups: int = 1,
    kernel: int = 1,
    before: np.ndarray = ONES,
    behind: np.ndarray = ONES,
) -> str:
    """[WIDE → WIDE], each channel as large as told, before and behind."""
    inside = WIDE // groups
    weight = sample(WIDE, inside, kernel, kernel, seed=seed) / (kernel * np.sqrt(inside))
    weight *= behind.reshape(-1, 1, 1, 1)
    weight /= before.reshape(1, -1, 1, 1) if groups == 1 else before.reshape(-1, 1, 1, 1)
    bias = sample(WIDE, seed=seed + 50) * behind
    return g("Conv", x, weight, bias, pads=[kernel // 2] * 4, group=groups)


def hard_swish(g: SmallGraph, x: str) -> str:
    return g("HardSwish", x)


def mobile(g: SmallGraph, start: str = "x") -> str:
    """Pointwise and depthwise convolutions, HardSwish, a scaled and a shifted one, a skip."""
    x = hard_swish(g, conv(g, start, 1))
    y = g("Add", g("Mul", hard_swish(g, conv(g, x, 2)), 0.7), 0.3)
    y = hard_swish(g, conv(g, y, 3, groups=WIDE, kernel=3))
    y = g("Relu", conv(g, y, 4))
    y = g("Add", conv(g, y, 5), conv(g, x, 6))
    return conv(g, y, 7)


def plan_of(model: ir.Model, **options: object) -> Plan:
    blocks = find_blocks(model)
    config = QuantizeConfig(quantizer="deploy", threads=1, **options)  # type: ignore[arg-type]
    plan = Plan(model, blocks, find_sites(model, blocks), config)
    return rewritten(plan, BATCHES) if config.equalizes else in_form(plan)


def quantized(model: ir.Model, **options: object) -> SiteQuantizer:
    made = make_quantizer(plan_of(model, **options))
    made.run(torch.from_numpy(BATCHES[0]), BATCHES)
    return made


def fused(outputs: Sequence[str], g: SmallGraph) -> ir.Model:
    model = g.model(*outputs)
    fuse(model)
    return model


def decibels(found: np.ndarray, expected: np.ndarray) -> float:
    noise = np.square(found.astype(np.float64) - expected).sum()
    return float(-10 * np.log10(noise / np.square(expected.astype(np.float64)).sum()))


@pytest.fixture(scope="module")
def network() -> ir.Model:
    g = SmallGraph(("batch", WIDE, SIDE, SIDE))
    return fused([mobile(g)], g)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of HardSwish that take no time, so that it is on codes wherever that is possible."""
    monkeypatch.setitem(region_costs.CODES, "HardSwish", 0.0)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("equalize", [True, False])
def test_a_chain_stays_on_codes(network: ir.Model, equalize: bool) -> None:
    made = quantized(network, equalize=equalize)
    file = standardise(lower(made.model, made.specs))
    report = check(file, "onnxruntime")
    assert report.errors == ()
    assert report.warnings == ()
    found = optimised_histogram(serialize(file))
    assert found["QLinearConv"] == 7
    assert not {"Conv", "FusedConv", "HardSigmoid", "Clip", "Relu"} & found.keys()
    assert found["DequantizeLinear"] == found["QuantizeLinear"] == 1
    # A HardSwish is one integer sum and one product, with equalisation one more.
    assert found["QLinearAdd"] == 3 + 1 + 1
    assert found["QLinearMul"] == (6 if equalize else 3)


def test_factors_per_channel_save_decibels() -> None:
    """Channels from 1/16 to 4, which one scale holds badly."""
    g, wide = SmallGraph(("batch", WIDE, SIDE, SIDE)), {"groups": WIDE, "kernel": 3}
    y = hard_swish(g, conv(g, "x", 1, behind=LEVELS))
    y = hard_swish(g, conv(g, y, 2, before=LEVELS, behind=LEVELS, **wide))  # type: ignore[arg-type]
    y = g("Relu", conv(g, y, 3, before=LEVELS, behind=LEVELS))
    network = fused([conv(g, g("Relu", conv(g, y, 4, before=LEVELS)), 5)], g)
    expected = run(network, BATCHES[0])[0]
    sqnr = {}
    for equalize in (True, False):
        made = quantized(network, equalize=equalize)
        np.testing.assert_allclose(
            run(made.plan.model, BATCHES[0])[0], expected, rtol=1e-3, atol=1e-3
        )
        file = standardise(lower(made.model, made.specs))
        sqnr[equalize] = decibels(run(file, BATCHES[0])[0], expected)
    assert sqnr[True] > 27
    assert sqnr[True] > sqnr[False] + 3


def test_the_simulation_has_the_codes_of_the_file(network: ir.Model) -> None:
    made = quantized(network)
    simulator = Simulator(made.model, made, threads=1)
    names = [t for t in made.regions.tensors if made.plan.sites[t].producer is not None]
    values = simulator.run(BATCHES[1], [t for t in names if not t.startswith("x")])
    model = standardise(lower(made.model, made.specs))
    expected = run(model, BATCHES[1])[0]
    output = next(iter(simulator.graph.outputs))
    assert decibels(simulator.run(BATCHES[1])[output], expected) > 30
    for tensor, value in values.items():
        spec = made.specs[tensor]
        codes = value / spec.scale
        np.testing.assert_allclose(codes, np.rint(codes), atol=2e-3)


@pytest.mark.usefixtures("cheap")
def test_what_is_kept_in_float_is_decided_without(network: ir.Model) -> None:
    regions = find_regions(network.graph)
    last = next(n for n in reversed(list(network.graph)) if n.op_type == "Conv")
    assert last in regions.convolutions
    kept = find_regions(network.graph, {str(last.outputs[0].name)})
    assert kept.convolutions == regions.convolutions - {last}


def test_a_lone_depthwise_convolution_stays_float() -> None:
    g = SmallGraph(("batch", WIDE, SIDE, SIDE))
    model = fused([g("Tanh", conv(g, g("Tanh", "x"), 1, groups=WIDE, kernel=3))], g)
    regions = find_regions(model.graph)
    assert not regions.convolutions
    (reason,) = regions.floats.values()
    assert reason.startswith("codes around it would cost more time")
    made = quantized(model)
    assert made.specs == {}
    assert list(made.float_nodes.values()) == [f"stays float: {reason}"]


def test_hard_swish_is_on_codes_where_that_takes_less_time(
    network: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for time in (0.0, 10.0):
        monkeypatch.setitem(region_costs.CODES, "HardSwish", time)
        found[time] = Counter(n.op_type for n in find_regions(network.graph).ops)["HardSwish"]
    assert found == {0.0: 3, 10.0: 0}


def test_more_integers_cost_little_time_in_all() -> None:
    """Of two depthwise convolutions between pointwise ones whose codes cost a little more time the
    first stays float where both together would cost more than is spared."""
    g = SmallGraph(("batch", WIDE, SIDE, SIDE))
    y = conv(g, "x", 1)
    for seed in (2, 4):
        y = conv(g, conv(g, y, seed, groups=WIDE, kernel=5), seed + 1)
    finder = _Finder(fused([y], g).graph, frozenset(), MORE)
    every_one = {n for n in finder.nodes if n.op_type == "Conv"}
    deep = [n for n in finder.nodes if n.attributes.get_int("group", 1) > 1]
    fastest = every_one - set(deep)
    for part, floats, left in ((0.4, 200, 0), (0.6, 200, 1), (1.1, 200, 2), (0.4, 100, 2)):

        def cost(kept: set[ir.Node], part: float = part, floats: float = floats) -> float:
            return 100 + 100 * MORE * part * len(kept - fastest) if kept else floats

        finder.cost = cost  # type: ignore[assignment, method-assign]
        assert finder._filled(fastest, set(deep)) == every_one - set(deep[2 - left :])


def test_what_was_decided_stays_whatever_is_written_around_it(
    network: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ops of equalisation cost time of their own; without the decision they would change it."""
    model = network.clone()
    before = find_regions(model.graph)
    decide(model.graph, before)
    monkeypatch.setattr(region_costs, "NODE", 1e9)
    assert not find_regions(network.graph).convolutions
    names = {n.name for n in find_regions(model.clone().graph).convolutions}
    assert names == {n.name for n in before.convolutions} != set()


def test_a_channel_of_several_outputs_stays_float() -> None:
    """Its groups are products of their own to the integer kernel: 30 times as slow."""
    g = SmallGraph(("batch", WIDE, SIDE, SIDE))
    weight = sample(2 * WIDE, 1, 3, 3, seed=1)
    y = g("Conv", conv(g, "x", 2), weight, pads=[1] * 4, group=WIDE)
    model = fused([g("Conv", y, sample(WIDE, 2 * WIDE, 1, 1, seed=3))], g)
    floats = find_regions(model.graph).floats
    deep = next(n for n in model.graph if n.attributes.get_int("group", 1) > 1)
    assert "groups have few channels" in floats[name_of(deep)]


@pytest.mark.parametrize(
    ("op", "factor", "expected"),
    [
        ("HardSwish", None, -3.09), ("HardSwish", 2.0, -1.545), ("HardSwish", -2.0, -np.inf),
        ("Silu", None, -12.0), ("Gelu", 0.5, -9.0), ("Tanh", None, -np.inf),
    ],
)  # fmt: skip
def test_codes_end_where_an_activation_function_makes_zero(
    op: str, factor: float | None, expected: float
) -> None:
    g = SmallGraph(("batch", WIDE, SIDE, SIDE))
    u = conv(g, "x", 1)
    x = u if factor is None else g("Mul", u, factor * np.ones((WIDE, 1, 1), np.float32))
    parts = {"Silu": lambda: g("Mul", x, g("Sigmoid", x)), "Gelu": lambda: g("Gelu", x)}
    y = conv(g, parts.get(op, lambda: g(op, x))(), 2)
    made = fused if factor is None else (lambda outputs, g: g.model(*outputs))  # else it is folded
    alone = made([y], g)
    maker = next(n for n in alone.graph if n.op_type == "Conv")
    assert least(maker.outputs[0]) == pytest.approx(expected)
    read_too = made([y, u], g)  # all of it counts where it is an output of the model
    maker = next(n for n in read_too.graph if n.op_type == "Conv")
    assert least(maker.outputs[0]) == -np.inf


def test_narrow_groups_and_single_pixels_stay_float() -> None:
    g = SmallGraph(("batch", WIDE, SIDE, SIDE))
    grouped = conv(g, conv(g, "x", 1), 2, groups=16, kernel=3)
    squeezed = conv(g, g("GlobalAveragePool", grouped), 3)
    model = fused([g("Mul", grouped, g("HardSigmoid", squeezed))], g)
    floats = find_regions(model.graph).floats
    convs = [name_of(n) for n in model.graph if n.op_type == "Conv"]
    assert "groups have few channels" in floats[convs[1]]
    assert floats[convs[2]].startswith("one number per channel and image")


def test_a_dead_channel_keeps_its_bias() -> None:
    """Its weights are zero: int32 codes of the bias in steps of almost nothing would overflow."""
    g = SmallGraph(("batch", WIDE, SIDE, SIDE))
    weight = sample(WIDE, WIDE, 1, 1, seed=1) / 8
    weight[5] = 0
    bias = np.full(WIDE, 0.5, np.float32)
    y = g("Conv", conv(g, "x", 2), weight, bias)
    model = fused([conv(g, g("Relu", y), 3)], g)
    made = quantized(model, equalize=False)
    node = [n for n in model.graph if n.op_type == "Conv"][1]
    spec = made.specs[str(node.inputs[1].name)]
    read = made.specs[str(node.inputs[0].name)]
    assert spec.scale[5] * float(read.scale) * LARGEST_BIAS >= 0.5 * (1 - 1e-6)
    file = standardise(lower(made.model, made.specs))
    assert decibels(run_optimised(file), run(model, BATCHES[0])[0]) > 25


def run_optimised(model: ir.Model) -> np.ndarray:
    """With ONNX Runtime's own fusions, which put biases into codes."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(serialize(model), options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: BATCHES[0]})[0]
    return found


def test_they_stay_in_float_where_the_outputs_do_not_bear_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = SmallGraph(("batch", 3, SIDE, SIDE))
    stem = g("Conv", "x", sample(WIDE, 3, 3, 3, seed=8) / 5, pads=[1] * 4)
    y = g("ReduceMean", mobile(g, stem), np.array([2, 3]), keepdims=0)
    save(g.model(y), tmp_path / "model.onnx")
    np.save(tmp_path / "images.npy", sample(8, 3, SIDE, SIDE, seed=2))

    def reported(name: str, **options: Any) -> dict[str, Any]:
        ptq_onnx.quantize(
            tmp_path / "model.onnx", calib=tmp_path / "images.npy", output=tmp_path / name,
            report=False, threads=1, **options,
        )  # fmt: skip
        found: dict[str, Any] = json.loads((tmp_path / name / "report.json").read_text())
        return found

    def file(name: str) -> bytes:
        return (tmp_path / name / "quantized.onnx").read_bytes()

    told = "they stay in float. --convolutions keeps them on codes."
    borne = reported("borne")
    assert not any(told in note for note in borne["notes"])
    monkeypatch.setattr(lossy_regions, "FLOOR", 300.0)
    fallen = reported("fallen")
    assert [note for note in fallen["notes"] if told in note] != []
    assert fallen["config"]["convolutions"] is False
    reported("off", convolutions=False)
    more = reported("on", convolutions=True)
    assert file("fallen") == file("off")
    shares = [found["coverage"]["percent"] for found in (fallen, borne, more)]
    assert shares[0] < shares[1] <= shares[2]
    assert file("on") != file("off")
