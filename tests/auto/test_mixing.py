"""Widths of single modules: what is mixed, how it is written, and that it is nearer for as much."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from prepared_models import ROOT, images, quantized
from short_digits import short_digits

from ptq_onnx.analysis.mixed_results import Mixed
from ptq_onnx.analysis.variants import Images
from ptq_onnx.api import quantize
from ptq_onnx.auto.mixing import WIDTHS, groups_of, mix
from ptq_onnx.auto.module_noise import Group, module_noise
from ptq_onnx.blocks.walking import is_linear
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError
from ptq_onnx.numerics.fake_quantize import fake_quantize
from ptq_onnx.quantizers.base import SiteQuantizer


@cache
def base() -> SiteQuantizer:
    return quantized(quantizer="lowbit", bits="4/4/4")


def mixed(**options: object) -> tuple[QuantizeConfig, Mixed]:
    """Chosen by what needs no run of every module, if not said otherwise."""
    quantizer = base()
    asked = replace(quantizer.plan.config, **{"mixed": True, "mixed_by": "layer", **options})  # type: ignore[arg-type]
    other = _with(quantizer, asked)
    few = Images(images()[:4])
    return mix(other, quantizer.specs, few, lambda: 0.4, lambda _: lambda __: None)


def _with(quantizer: SiteQuantizer, config: QuantizeConfig) -> SiteQuantizer:
    from ptq_onnx.quantizers.by_name import make_quantizer

    return make_quantizer(replace(quantizer.plan, config=config))


def test_everything_but_the_ends_is_mixed() -> None:
    groups = groups_of(base())
    assert {g.role for g in groups if not g.weights} == {
        "norm1", "q", "k", "v", "softmax", "av", "norm2", "gelu",
    }  # fmt: skip
    assert {g.role.removesuffix(".weight") for g in groups if g.weights} == {
        "q", "k", "v", "proj", "fc1", "fc2",
    }  # fmt: skip
    assert len(groups) == len({g.name for g in groups}) == 14 * 6
    by_name = {g.name: g for g in groups}
    assert by_name["blocks.2.fc1.weight"].elements == 64 * 256
    assert by_name["blocks.2.norm1"].elements == 65 * 64
    assert by_name["blocks.2.softmax"].elements == 4 * 65 * 65


def test_narrow_ends_are_mixed_and_what_was_named_is_not() -> None:
    quantizer = base()
    config = replace(quantizer.plan.config, wide_ends=False, more_bits=("fc1.weight", "av@2=6"))
    groups = groups_of(_with(quantizer, config))
    found = {g.role for g in groups}
    assert {"patch_embed.weight", "head.weight", "norm"} <= found
    assert "fc1.weight" not in found
    assert [g.block for g in groups if g.role == "softmax"] == [0, 1, 3, 4, 5]  # A·V reads it


@pytest.mark.parametrize("target", [None, 3, 4.5, 7.25])
def test_the_means_are_at_most_the_target(target: float | None) -> None:
    """And hardly less; the config names every width and needs no search."""
    config, found = mixed(target_bits=target)
    assert (config.mixed, config.target_bits, config.mixes_widths) == (None, None, False)
    aim = target or 4.0
    for part, (before, after) in (("weights", found.weights), ("activations", found.activations)):
        own = [m for m in found.modules if m.part == part]
        total = sum(m.bits * m.elements for m in own) / sum(m.elements for m in own)
        assert after == pytest.approx(total)
        assert aim - 0.04 < after <= aim
        assert before == 4
    rules = _with(base(), config).rules
    by_place = {(m.role, m.block): m.bits for m in found.modules}
    for tensor, rule in rules.items():
        site = base().plan.sites[tensor]
        assert rule.bits == by_place.get((site.role, site.block), 8), site.label
    again = QuantizeConfig.from_mapping(json.loads(json.dumps(_plain(config))), "there")
    assert again == config


def _plain(config: QuantizeConfig) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(config)


def test_a_size_is_kept_with_weights_of_four_and_eight_bits() -> None:
    """0.4 MB with 4 bits everywhere: 0.05 more are 100,000 weights of 8, and some for the factors
    and zero points of blocks that they do not have."""
    config, found = mixed(target_size=0.45)
    weights = [m for m in found.modules if m.part == "weights"]
    assert {m.bits for m in weights} == {4, 8}
    wide = sum(m.elements for m in weights if m.bits == 8)
    beside = {g.name: g.beside for g in groups_of(base()) if g.weights}
    without = sum(beside[m.module] for m in weights if m.bits == 8)
    assert 0.43 < found.megabytes <= 0.45
    assert found.megabytes == pytest.approx(0.4 + (wide / 2 - without) / 1e6)
    assert wide > 100_000
    assert {m.bits for m in found.modules if m.part == "activations"} == {4}
    assert not any(text.startswith("gelu") and "=4" not in text for text in config.more_bits)
    with pytest.raises(ConfigError, match=r"^--target-size 0\.3: with weights of 4 bits[^\n]+ends"):
        mixed(target_size=0.3)


def test_points_get_better_with_every_bit_and_are_better_than_alike() -> None:
    _, found = mixed()
    for one, other in zip(found.points, found.points[1:], strict=False):
        assert other.weights_db > one.weights_db
        assert other.activations_db > one.activations_db
        assert other.megabytes >= one.megabytes
    four = next(p for p in found.points if p.bits == 4)
    assert four.uniform_weights_db is not None
    assert four.weights_db > four.uniform_weights_db
    assert next(p for p in found.points if p.bits == 4.5).uniform_weights_db is None


def test_what_ranks_a_weight_by_hand() -> None:
    """``layer``: noise over signal of the linear's output; ``nuclear``: Σσ ‖Ŵ - W‖²."""
    quantizer = base()
    node = next(
        n for n in quantizer.plan.model.graph
        if is_linear(n) and str(n.inputs[1].name) in quantizer.specs
        and quantizer.plan.sites[str(n.inputs[1].name)].role == "fc1.weight"
    )  # fmt: skip
    name = str(node.inputs[1].name)
    weight = np.asarray(node.inputs[1].const_value.numpy(), np.float32)
    lost = fake_quantize(weight, quantizer.specs[name]) - weight
    group = Group("fc1.weight", 0, True, 4, frozenset({name}), weight.size)
    few = Images(images()[:4])
    (nuclear,) = module_noise("nuclear", quantizer.plan.model, quantizer.specs, [group], few)
    expected = np.linalg.norm(weight, "nuc") * np.sum(lost**2)
    assert nuclear == pytest.approx(expected, rel=1e-4)
    (layer,) = module_noise("layer", quantizer.plan.model, quantizer.specs, [group], few)
    assert 1e-5 < layer < 0.1
    (output,) = module_noise("output", quantizer.plan.model, quantizer.specs, [group], few)
    assert 1e-6 < output < 0.1


def test_a_mixed_file_is_nearer_than_one_of_the_same_mean(tmp_path: Path) -> None:
    """The whole job, on three blocks (measured on all six: 6.8 dB at 4 bits in the mean)."""
    model = short_digits(tmp_path / "short.onnx", 3)
    found = {}
    for name, options in (("alike", {}), ("mixed", {"mixed": True})):
        result = quantize(
            model, output=tmp_path / name, calib=ROOT / "img/digits/calib", quantizer="lowbit",
            bits="4/4/4", images=16, analysis_images=16, threads=1, report=False,
            check_preprocess=False, **options,
        )  # fmt: skip
        found[name] = result.report
    assert found["mixed"]["fidelity"]["sqnr_db"] > found["alike"]["fidelity"]["sqnr_db"] + 2
    assert found["alike"]["mixed"] is None
    assert found["mixed"]["config"]["more_bits"] == list(found["mixed"]["mixed"]["more_bits"])
    told = [n for n in found["mixed"]["notes"] if n.startswith("Mixed: 42 groups")]
    assert len(told) == 1
    bits = {t["tensor"]: t["bits"] for t in found["mixed"]["tensors"]}
    assert {*bits.values()} <= {*WIDTHS}
    written = found["mixed"]["sizes"]["quantized"]
    assert found["mixed"]["mixed"]["megabytes"] * 1e6 == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bits": 4}, "--target-bits belongs to the quantizer lowbit, not deploy"),
        ({"target_size": 4}, "--target-size belongs to the quantizer lowbit, not deploy"),
        ({"mixed_by": "layer"}, "--mixed-by belongs to the quantizer lowbit, not deploy"),
        ({"more_bits": ("fc2=4",)}, "--more-bits fc2=4: expected 8 to 16 bits"),
        ({"quantizer": "lowbit", "target_bits": 4, "target_size": 4}, "exclude each other"),
        ({"quantizer": "lowbit", "target_bits": 4, "mixed": False}, "--no-mixed with --target-b"),
        ({"quantizer": "lowbit", "mixed": True, "bits": "8/16/8"}, "widths of 2 to 8 bits are"),
        ({"quantizer": "lowbit", "target_bits": 9}, "--target-bits"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        QuantizeConfig(**options)  # type: ignore[arg-type]
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
