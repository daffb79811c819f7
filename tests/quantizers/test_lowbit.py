"""Lowbit: what it quantizes and how, that its file is what was simulated, and what it gains."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from prepared_models import DIGITS, ROOT, decibels, images, prepared, quantized
from test_targets import run

from ptq_onnx.blocks.walking import is_linear, name_of
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.errors import ConfigError
from ptq_onnx.numerics.around.row_maximum import RowMaximum
from ptq_onnx.numerics.around.row_sums import RowSums
from ptq_onnx.numerics.codes.uniform import Uniform
from ptq_onnx.numerics.fake_quantize import dequantize, quantize
from ptq_onnx.numerics.spec import TensorSpec
from ptq_onnx.numerics.weights import weight_scale
from ptq_onnx.preparation import model_files as graphs
from ptq_onnx.qdq.lowering import lower
from ptq_onnx.quantizers.base import SiteQuantizer
from ptq_onnx.quantizers.importance import importance_of_inputs
from ptq_onnx.targets.checking.check import check


@cache
def made(bits: str = "4/4/4") -> SiteQuantizer:
    return quantized(quantizer="lowbit", bits=bits)


def rules_by_role(quantizer: SiteQuantizer, **options: object) -> dict[str, set[tuple[int, str]]]:
    """Widths and codes of each role, under other options where some are given."""
    config = replace(quantizer.plan.config, **options)  # type: ignore[arg-type]
    found: dict[str, set[tuple[int, str]]] = {}
    for tensor, rule in quantizer.rules_under(config).items():
        role = quantizer.plan.sites[tensor].role
        found.setdefault(role, set()).add((rule.bits, rule.code.name))
    return found


def test_which_codes_have_how_many_bits() -> None:
    found = rules_by_role(made())
    for role in ("norm1", "norm2", "q", "k", "v", "av", "q.weight", "fc1.weight", "proj.weight"):
        assert found.get(role, {(4, "uniform")}) == {(4, "uniform")}, role
    assert found["softmax"] == found["gelu"] == {(4, "logarithmic")}
    for role in ("input", "norm", "patch_embed.weight", "head.weight"):
        assert found[role] == {(8, "uniform")}, role


def test_narrow_ends_are_as_published() -> None:
    """Weights and the head's input have the bits of all others, the image has 8."""
    found = rules_by_role(made(), wide_ends=False)
    assert found["input"] == {(8, "uniform")}
    for role in ("norm", "patch_embed.weight", "head.weight"):
        assert found[role] == {(4, "uniform")}, role


def test_eight_bits_are_uniform() -> None:
    """An integer kernel multiplies them; logarithmic codes have none."""
    quantizer = made()
    rules = quantizer.rules_under(replace(quantizer.plan.config, bits="4/8/8"))
    assert {r.code for r in rules.values()} == {Uniform()}
    maps = [r for t, r in rules.items() if quantizer.plan.sites[t].role == "softmax"]
    assert all(r.around == (RowMaximum(),) for r in maps)


def test_maps_are_relative_to_their_row_and_divided_by_their_sum() -> None:
    quantizer = made()
    for site in quantizer.plan.sites.values():
        if site.role != "softmax":
            continue
        spec = quantizer.specs[site.tensor]
        assert spec.rule.around == (RowMaximum(), RowSums())
        assert (float(spec.scale), int(spec.zero_point)) == (1.0, 15)
        again = TensorSpec.from_json(site.tensor, spec.to_json())
        assert again.rule == spec.rule
        assert again.details == spec.details


@pytest.mark.parametrize("bits", ["4/4/4", "6/8/6"])
def test_the_file_is_what_was_simulated(bits: str, tmp_path: Path) -> None:
    quantizer, x = made(bits), images()[:8]
    path = tmp_path / "quantized.onnx"
    graphs.save(graphs.to_standard(lower(quantizer.model, quantizer.specs)), path)
    found = run(path, x)
    exact = next(iter(Simulator(quantizer.model, quantizer, threads=1).run(x).values()))
    assert decibels(found, exact) >= 60
    rules = {v.rule for v in check(path, "onnxruntime").violations}
    assert rules <= {"table-codes"}  # logarithmic codes have no integer kernel


def test_every_activation_was_solved_on_the_sample() -> None:
    """Nothing falls back to the ranges of ``deploy``, but for what has 8 bits: values that no
    sample has would be clipped there, and cost more than the levels that they need."""
    quantizer = made()
    sites = [s for s in quantizer.plan.sites.values() if not s.is_parameter]
    left = [s for s in sites if s.tensor in quantizer.rules]
    wide = {s.tensor for s in left if quantizer.rules[s.tensor].bits == 8}
    assert wide == {s.tensor for s in left if s.tensor not in quantizer.plan.solved}
    assert {s.role for s in left if s.tensor in wide} == {"input", "norm"}


def test_a_method_that_counts_for_eight_bits_alone_is_said_to() -> None:
    other, quantizer = quantized(quantizer="lowbit", bits="4/4/4", method="minmax"), made()
    assert {r.method for r in other.rules.values() if r.bits == 8} == {"minmax"}
    sites = quantizer.plan.sites
    few = [t for t, rule in quantizer.rules.items() if rule.bits < 8]
    ranges = [t for t in few if not sites[t].is_parameter]
    assert len(ranges) > 40
    for tensor in ranges:  # found on the sample, whatever the method
        spec, same = quantizer.specs[tensor], other.specs[tensor]
        np.testing.assert_array_equal(same.scale, spec.scale, err_msg=tensor)
    (said,) = (n for n in other.notes if n.startswith("--method"))
    assert said == (
        "--method minmax counts for what has 8 bits; the ranges of fewer are searched on a sample"
        " (lowbit)."
    )
    assert not any(n.startswith("--method") for n in quantizer.notes)


def test_weights_are_codes_of_their_scales() -> None:
    """Rounded weights are on their grid, at most 16 levels to a column of 32 rows."""
    quantizer = made()
    for node in quantizer.model.graph:
        if not is_linear(node) or node.inputs[1].name not in quantizer.specs:
            continue
        spec = quantizer.specs[str(node.inputs[1].name)]
        weight = np.asarray(node.inputs[1].const_value.numpy(), np.float32)
        np.testing.assert_allclose(dequantize(quantize(weight, spec), spec), weight, atol=1e-6)
        codes = quantize(weight, spec)
        if spec.rule.bits == 8:
            continue
        assert spec.rule.bits == 4
        assert np.abs(codes).max() <= 127
        for rows in np.split(codes[spec.order], range(32, len(codes), 32)):
            for column in rows.T:
                steps = np.gcd.reduce(column) or 1
                assert len(np.unique(column)) <= 16
                assert max(column.max(), 0) - min(column.min(), 0) <= 15 * steps


def test_the_power_of_an_input_decides_how_far_a_scale_shrinks() -> None:
    """A large weight behind an input of almost zero is clipped, behind a large one it is not."""
    weight = np.random.default_rng(0).normal(size=(64, 1)).astype(np.float32)
    weight[0] = 8
    power = np.ones(64)
    power[0] = 1e-6
    little = weight_scale(weight, 1, 4, power=power)
    power[0] = 100
    much = weight_scale(weight, 1, 4, power=power)
    assert little[0] < 0.6 * much[0]


def test_it_is_nearer_than_deploy_with_gptq() -> None:
    """On pictures that calibration did not see (measured 2.0 dB at 4 bits)."""
    folder = ROOT / "img/digits/val"
    x = images(DIGITS, folder, 32)
    model = prepared(DIGITS).model
    real = next(iter(Simulator(model, threads=1).run(x).values()))
    others = quantized(quantizer="deploy", bits="4/4/4", rounding="gptq")
    mine, theirs = (
        decibels(next(iter(Simulator(q.model, q, threads=1).run(x).values())), real)
        for q in (made(), others)
    )
    assert mine > theirs + 1.0


@pytest.mark.parametrize("target", ["tensorrt", "openvino", "integer"])
def test_other_targets_are_refused_in_one_line(target: str) -> None:
    with pytest.raises(ConfigError, match=f"^--target {target}, quantizer lowbit: [^\n]+$"):
        QuantizeConfig(target=target, quantizer="lowbit")


def test_what_its_ranges_do_not_allow_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^--auto with --quantizer lowbit: [^\n]+--more-bits\.$"):
        QuantizeConfig(quantizer="lowbit", auto=True)
    with pytest.raises(ConfigError, match=r"^--scales there: lowbit rounds [^\n]+anew\.$"):
        made().reuse({}, "there")


def test_the_means_of_linears_are_those_of_the_float_model() -> None:
    """On the images that were calibrated with, at every linear but the ones that read codes of the
    image: the mean of what it makes, positions counting as they do for the output, differs by less
    than a hundredth of its size."""
    quantizer, x = made(), images()
    before = Simulator(quantizer.plan.model, threads=1)
    after = Simulator(quantizer.model, quantizer, threads=1)
    linears = [n for n in quantizer.plan.model.graph if is_linear(n)][:12]
    importance = importance_of_inputs(quantizer.plan.model, [x], len(x))
    names = [str(n.outputs[0].name) for n in linears]
    real, found = before.run(x, names), after.run(x, names)
    for node, name in zip(linears, names, strict=True):
        counts = importance.rows(str(node.inputs[0].name), real[name].shape[:-1])
        one, other = (
            np.average(v[name].reshape(len(counts), -1), axis=0, weights=counts)
            for v in (real, found)
        )
        assert float(np.abs(one - other).max()) < 0.01 * float(real[name].std()), name


def test_wide_ends_belong_to_lowbit() -> None:
    with pytest.raises(ConfigError, match=r"^--no-wide-ends belongs to the quantizer lowbit"):
        QuantizeConfig(quantizer="deploy", wide_ends=False)


def test_nodes_of_the_steps_have_roles() -> None:
    """What was put in is named after what it serves, so that options reach it."""
    quantizer = made()
    roles = quantizer.plan.blocks.roles
    steps = [n for n in quantizer.plan.model.graph if "stepped" in name_of(n)]
    assert {roles[name_of(n)].name for n in steps} == {"av"}
    heads = [n for n in quantizer.plan.model.graph if "headwise" in name_of(n)]
    assert {roles[name_of(n)].name for n in heads} <= {"qk_scale"}
