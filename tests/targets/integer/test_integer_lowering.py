"""Whole models in integers: interpreter, ONNX Runtime and simulator agree to the bit."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from bit_exact import assert_exact, opened, run
from prepared_models import DIGITS, decibels, images, prepared, quantized
from small_graph import SmallGraph, sample
from small_transformer import Choices, transformer

from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.blocks.walking import name_of
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.errors import ModelError
from ptq_onnx.fusion.rules import fuse
from ptq_onnx.images.opening import Preprocess, open_images
from ptq_onnx.preparation.prepare import prepare
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import Plan, SiteQuantizer
from ptq_onnx.quantizers.by_name import make_quantizer
from ptq_onnx.targets.integer.interpreter import Interpreter, differing_tensors
from ptq_onnx.targets.integer.lowering import lower_integer
from ptq_onnx.targets.integer.nodes import make_plan
from ptq_onnx.targets.integer.ranges import integer_ranges
from ptq_onnx.targets.integer.rules import violations
from ptq_onnx.targets.integer.simulated_steps import integer_overrides

CALIBRATION = {"vit": "inception", "vit-dynamo": "inception", "deit": "imagenet"}
OPTIONS = [
    {"bits": "8/8/8"},
    {"bits": "8/8/4"},
    {"bits": "6/7/3"},
    {"bits": "8/8/8", "lis": False},
    {"bits": "8/8/8", "lis": True},
    {"bits": "8/8/8", "ptf": False},
]


def run_in(session: ort.InferenceSession, batch: np.ndarray) -> np.ndarray:
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: batch})[0]
    return found


@cache
def shared(bits: str = "8/8/8") -> tuple[SiteQuantizer, ir.Model, ort.InferenceSession]:
    """The quantizer of the embedded model, its file, and that opened: nobody may change them."""
    quantizer = quantized(target="integer", bits=bits)
    file = lower_integer(prepared(DIGITS).model, quantizer.specs)
    return quantizer, file, opened(file)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_whole_model_is_bit_exact_three_times(options: dict[str, str]) -> None:
    model = prepared(DIGITS).model
    if options.keys() == {"bits"} and options["bits"] != "6/7/3":
        quantizer, file, session = shared(**options)
    else:
        quantizer = quantized(target="integer", **options)
        file = lower_integer(model, quantizer.specs)
        session = opened(file)
    batch = images()[:3]
    count, different, seen = differing_tensors(ir.to_proto(file), [batch[:2], batch[2:]])
    assert different == []
    assert count > 1400
    overrides, left = integer_overrides(model, quantizer.specs)
    assert left == []
    simulated = Simulator(model, quantizer, overrides=overrides, threads=1).run(batch)["logits"]
    np.testing.assert_array_equal(run_in(session, batch), simulated)
    proved = integer_ranges(file)
    assert proved.overflows == []
    for name, entry in proved.tensors.items():
        assert entry.low <= seen[name][0], name
        assert seen[name][1] <= entry.high, name


@pytest.mark.parametrize("bits", ["8/8/8", "8/8/4"])
def test_integers_are_as_near_to_float_as_float_arithmetic(bits: str) -> None:
    """Within 1 dB of the same codes with float LayerNorm, softmax and GELU."""
    model, batch = prepared(DIGITS).model, images()
    quantizer, _, session = shared(bits)
    plain = run(model, batch)
    integer = decibels(run_in(session, batch), plain)
    floating = decibels(run(lower(model, quantizer.specs), batch), plain)
    assert integer > floating - 1


def test_no_float_stands_inside() -> None:
    _, file, _ = shared()
    assert violations(file) == []
    ops = Counter(node.op_type for node in file.graph)
    assert ops["QuantizeLinear"] == ops["DequantizeLinear"] == 1
    # 6 blocks of qkv, QKᵀ, A·V, proj, fc1 and fc2, and the head.
    assert ops["MatMulInteger"] == 6 * 6 + 1
    assert ops["ConvInteger"] == 1
    assert {node.domain for node in file.graph} == {""}


def test_log2_maps_of_eight_bits_take_three_products() -> None:
    """One for each byte of the shifts, and one for all in shares of the row's largest value."""
    model = transformer(Choices())
    plans = {lis: calibrated(model, lis=lis) for lis in (True, None)}
    files = {lis: lower_integer(model, one.specs) for lis, one in plans.items()}
    ops = {lis: Counter(n.op_type for n in file.graph) for lis, file in files.items()}
    assert ops[True]["MatMulInteger"] == ops[None]["MatMulInteger"] + 2
    assert ops[True]["BitShift"] > ops[None]["BitShift"]
    assert violations(files[True]) == violations(files[None]) == []


def test_fewer_multiplier_bits_cost_accuracy_and_nothing_else() -> None:
    model, batch = prepared(DIGITS).model, images()
    quantizer, _, whole = shared()  # 31 bits
    plain = run(model, batch)
    file = lower_integer(model, quantizer.specs, 4)
    assert violations(file) == []
    found = [decibels(run(file, batch), plain), decibels(run_in(whole, batch), plain)]
    assert found[0] < found[1] - 3


def test_gelu_by_polynomial() -> None:
    """The same integers in simulator, interpreter and ONNX Runtime; no table is looked up."""
    model, batch = prepared(DIGITS).model, images()[:2]
    quantizer, _, _ = shared()
    file = lower_integer(model, quantizer.specs, gelu="polynomial")
    assert violations(file) == []
    ops = Counter(node.op_type for node in file.graph)
    assert (ops["Abs"], ops["Gather"]) == (6, 1)  # a GELU a block; the class token
    _, different, _ = differing_tensors(ir.to_proto(file), [batch])
    assert different == []
    overrides, left = integer_overrides(model, quantizer.specs, gelu="polynomial")
    assert left == []
    simulated = Simulator(model, quantizer, overrides=overrides, threads=1).run(batch)["logits"]
    np.testing.assert_array_equal(run(file, batch), simulated)


def test_gelu_by_polynomial_needs_a_gelu() -> None:
    model = transformer(Choices(activation="Relu"))
    specs = calibrated(model).specs
    for function in (lower_integer, integer_overrides):
        with pytest.raises(ModelError, match=r"^--gelu polynomial: the model has no GELU"):
            function(model, specs, gelu="polynomial")


@pytest.mark.parametrize("opset", [22, 23])
def test_other_opsets(opset: int) -> None:
    found = prepare(DIGITS, opset)
    quantizer, _, session = shared()
    file = lower_integer(found.model, quantizer.specs)
    assert violations(file) == []
    batch = images()[:2]
    np.testing.assert_array_equal(run(file, batch), run_in(session, batch))


def patches_by_reshape() -> ir.Model:
    """Patches cut out of the image by layout ops, embedded by a linear, then norm and head."""
    g = SmallGraph(("batch", 1, 4, 4))
    x = g("Reshape", "x", np.array([0, 2, 2, 2, 2]))
    x = g("Reshape", g("Transpose", x, perm=[0, 1, 3, 2, 4]), np.array([0, 4, 4]))
    x = g("Add", g("MatMul", x, sample(4, 8, seed=1)), sample(8, seed=2))
    x = g("LayerNormalization", x, np.ones(8), np.zeros(8), axis=-1)
    x = g("ReduceMean", x, np.array([1]), keepdims=0)
    model = g.model(g("Add", g("MatMul", x, sample(8, 3, seed=3)), sample(3, seed=4)))
    fuse(model)
    return model


def test_an_image_is_quantized_before_layout_ops() -> None:
    model = patches_by_reshape()
    rng = np.random.default_rng(0)
    batch = rng.normal(0, 1, (8, 1, 4, 4)).astype(np.float32)
    quantizer = calibrated(model, [batch])
    file = lower_integer(model, quantizer.specs)
    assert violations(file) == []
    assert next(iter(file.graph)).op_type == "QuantizeLinear"
    overrides, left = integer_overrides(model, quantizer.specs)
    assert left == []
    name = str(model.graph.outputs[0].name)
    simulated = Simulator(model, quantizer, overrides=overrides, threads=1).run(batch)[name]
    np.testing.assert_array_equal(run(file, batch), simulated)
    assert decibels(run(file, batch), run(model, batch)) > 30


def test_the_width_of_multipliers_is_that_of_the_simulator() -> None:
    model = prepared(DIGITS).model
    quantizer, _, whole = shared()
    batch = images()[:2]
    overrides, _ = integer_overrides(model, quantizer.specs, 8)
    simulated = Simulator(model, quantizer, overrides=overrides, threads=1).run(batch)["logits"]
    np.testing.assert_array_equal(run(lower_integer(model, quantizer.specs, 8), batch), simulated)
    assert not np.array_equal(run_in(whole, batch), simulated)


def test_a_batch_gives_what_its_images_give() -> None:
    _, _, session = shared()
    batch = images()[:4]
    one_by_one = [run_in(session, batch[i : i + 1])[0] for i in range(4)]
    np.testing.assert_array_equal(run_in(session, batch), one_by_one)


# --- other structures, and what is refused ----------------------------------------------


def calibrated(
    model: ir.Model, batches: list[np.ndarray] | None = None, **options: Any
) -> SiteQuantizer:
    """A quantizer of a small model; by default of one whose input is [batch, 6, 8]."""
    import torch

    blocks = find_blocks(model)
    config = QuantizeConfig(target="integer", threads=1, **options)
    quantizer = make_quantizer(_plan(model, blocks, config))
    rng = np.random.default_rng(0)
    if batches is None:
        batches = [rng.normal(0, 1, (8, 6, 8)).astype(np.float32) for _ in range(2)]
    quantizer.run(torch.zeros(1, *batches[0].shape[1:]), batches)
    return quantizer


def _plan(model: ir.Model, blocks: object, config: QuantizeConfig) -> Plan:
    return Plan(model, blocks, find_sites(model, blocks), config)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "choices",
    [
        Choices(),
        Choices(packed=False),
        Choices(layer_scale=True),
        Choices(scale="before"),
        Choices(scale="none"),
        Choices(activation="Relu"),
        Choices(norms=False),
        Choices(packed=False, norms=False, mlp=False),
        Choices(pool=True),
        Choices(mask=True),
    ],
    ids=str,
)
def test_other_structures(choices: Choices) -> None:
    model = transformer(choices, blocks=2)
    quantizer = calibrated(model)
    batch = np.random.default_rng(1).normal(0, 1, (16, 6, 8)).astype(np.float32)
    assert_exact(model, quantizer, batch)


def test_one_weight_cannot_take_the_factors_that_three_read() -> None:
    """norm1 before q, k and v apart: one scale for the target integer, factors otherwise."""
    model = transformer(Choices(packed=False))
    quantizer = calibrated(model)
    norms = [s for s in quantizer.plan.sites.values() if s.role == "norm1"]
    assert [quantizer.rules[s.tensor].granularity for s in norms] == ["tensor"]
    packed = calibrated(transformer(Choices()))
    norms = [s for s in packed.plan.sites.values() if s.role == "norm1"]
    assert [packed.rules[s.tensor].granularity for s in norms] == ["ptf"]


def test_an_op_without_an_integer_form_is_refused_by_name() -> None:
    model = transformer(Choices(activation="Gelu"))
    specs = dict(calibrated(model).specs)
    for node in model.graph:
        if node.op_type == "Gelu":
            node.op_type = "Softsign"
    with pytest.raises(ModelError, match=r"^Node '.*' \(Softsign\): the integer target has no"):
        lower_integer(model, specs)


def test_a_tensor_without_a_scale_is_refused_by_name() -> None:
    model, specs = prepared(DIGITS).model, dict(shared()[0].specs)
    missing = next(n for n, s in prepared(DIGITS).sites.items() if s.role == "gelu")
    del specs[missing]
    with pytest.raises(ModelError, match=r"\(Gelu\): its output '.*' stays in float"):
        lower_integer(model, specs)


# --- the real models --------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    "name",
    ["deit", *(pytest.param(n, marks=pytest.mark.full_matrix) for n in ("vit", "vit-dynamo"))],
)
def test_real_models_are_bit_exact(name: str, real_models: dict[str, Path], shared: Path) -> None:
    path = real_models[name]
    preprocess = Preprocess.named(CALIBRATION[name])
    source = open_images(shared / "imagenet/calib", preprocess, limit=8)
    (calibration,) = source.batches(8)
    quantizer = quantized(path, calibration, target="integer")
    model = prepared(path).model
    file = lower_integer(model, quantizer.specs)
    assert violations(file) == []
    overrides, left = integer_overrides(model, quantizer.specs)
    assert left == []
    batch = calibration[:1]
    _, different, _ = differing_tensors(ir.to_proto(file), [batch])
    assert different == []
    simulator = Simulator(model, quantizer, overrides=overrides, threads=1)
    name_of_output = str(model.graph.outputs[0].name)
    np.testing.assert_array_equal(run(file, batch), simulator.run(batch)[name_of_output])


@pytest.mark.real
@pytest.mark.parametrize("images", [10, pytest.param(100, marks=pytest.mark.full_matrix)])
def test_many_images_in_the_interpreter(
    images: int, real_models: dict[str, Path], shared: Path
) -> None:
    """Every tensor of ViT-Ti, 8/8/4, the bits of ONNX Runtime (100 images: about a minute)."""
    path, preprocess = real_models["vit"], Preprocess.named("inception")
    source = open_images(shared / "imagenet/calib", preprocess, limit=8)
    (calibration,) = source.batches(8)
    quantizer = quantized(path, calibration, target="integer", bits="8/8/4")
    file = ir.to_proto(lower_integer(prepared(path).model, quantizer.specs))
    validation = open_images(shared / "imagenet/val", preprocess, limit=images)
    count, different, _ = differing_tensors(file, validation.batches(1))
    assert count > 3500
    assert different == []


def test_the_interpreter_keeps_its_outputs_only() -> None:
    _, file, session = shared()
    interpreter = Interpreter(ir.to_proto(file))
    batch = images()[:2]
    found = interpreter.run(batch)
    assert list(found) == ["logits"]
    np.testing.assert_array_equal(found["logits"], run_in(session, batch))


def test_the_plan_reads_as_a_line_for_every_node() -> None:
    model = transformer(Choices())
    plan = make_plan(model, calibrated(model).specs)
    lines = dict(line.split(": ", 1) for line in str(plan).splitlines())
    assert list(lines) == [name_of(node) for node in plan.steps]
    assert plan.left == ()
    by_role = {find_blocks(model).roles[name].name: text for name, text in lines.items()}
    assert by_role["softmax"] == "SoftmaxStep of codes 0…255 → codes 0…255"
    assert by_role["fc1"] == "LinearStep of codes 0…255 per channel → codes 0…255 per channel"
    bound = plan.steps[next(n for n in plan.steps if n.op_type == "MatMul")].made.high
    assert by_role["qk"].endswith(f"→ accumulator {-bound}…{bound}")


def test_what_is_left_in_float_is_in_the_plan() -> None:
    model = transformer(Choices(activation="Gelu"))
    specs = calibrated(model).specs
    next(node for node in model.graph if node.op_type == "Gelu").op_type = "Softsign"
    plan = make_plan(model, specs, strict=False)
    assert plan.image is None
    assert [node.op_type for node in plan.left]
    assert str(plan).splitlines()[-1] == f"{name_of(plan.left[-1])}: left in float"
