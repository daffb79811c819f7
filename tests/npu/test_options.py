"""Options of files for Qualcomm's NPU, and which activations mixed widths widen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_image_model import image_model
from small_transformer import Choices, transformer

from npu.units import tokens
from ptq_onnx.api import quantize
from ptq_onnx.blocks.roles import find_blocks
from ptq_onnx.blocks.sites import find_sites
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.by_name import make_quantizer
from ptq_onnx.quantizers.mixed import BUDGET, FACTORS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2, "target": "onnxruntime"}, "--batch-size with --target onnxruntime"),
        ({"mixed": True, "target": "tensorrt"}, "--mixed with --target tensorrt: it is for"),
        ({"mixed": True, "bits": "8/16/16"}, "--mixed with --bits 8/16/16: it widens 8 bits"),
        ({"keep_float": ("fc2",)}, "--keep-float with --target qnn: its ops all take codes"),
        ({"per_channel": ("fc2",)}, "--per-channel with --target qnn: its activations have one"),
        ({"batch_size": 2}, "--batch-size 2 with 16-bit codes"),
        ({"batch_size": 2, "mixed": False, "more_bits": ("fc2=16",)}, "with 16-bit codes"),
        ({"quantizer": "fqvit"}, "quantizer fqvit: the NPU takes one scale per activation"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizeConfig(**{"target": "qnn", **options})


def test_defaults_of_the_target() -> None:
    config = QuantizeConfig(target="qnn")
    assert (config.mixes, config.rotates, config.batch_size) == (True, True, 1)
    assert not QuantizeConfig(target="qnn", bits="8/16/16").mixes
    assert not QuantizeConfig(target="qnn", mixed=False).mixes
    assert not QuantizeConfig().mixes
    assert QuantizeConfig(target="qnn", mixed=False, batch_size=4).batch_size == 4


def test_mixed_widens_what_eight_bits_hold_worst() -> None:
    """A massive channel in the stream: its tensors come first, factors of products never."""
    model = transformer(Choices(), blocks=2)
    blocks = find_blocks(model)
    config = QuantizeConfig(target="qnn", equalize=False, bias_correction=False, threads=1)
    sites = find_sites(model, blocks, whole=True)
    quantizer = make_quantizer(Plan(model, blocks, sites, config))
    x = tokens(8)
    x[:, :, 3] *= 300
    specs = quantizer.calibrate([x])
    wide = {t for t, s in specs.items() if s.rule.bits == 16}
    assert {sites[t].role for t in wide} >= {"residual1"}
    assert not {sites[t].role for t in wide} & FACTORS
    assert all(specs[t].rule.stored == "uint16" for t in wide)
    acts = [s for s in sites.values() if s.tensor in specs and not s.is_parameter]
    readers = {name for s in acts if s.tensor in wide for name in s.consumers}
    made = [s for s in acts if s.tensor in wide or s.producer in readers]
    assert len(made) > len(wide)
    share = sum(s.elements for s in made) / sum(s.elements for s in acts)
    assert 0.2 < share <= BUDGET
    (note,) = [n for n in quantizer.notes if n.startswith("Mixed")]
    assert f"{len(wide)} of {len(acts)} activations have 16 bits" in note
    assert f" {100 * share:.0f} % of all elements" in note


def test_second_factors_have_eight_bits() -> None:
    model = transformer(Choices(packed=False))
    blocks = find_blocks(model)
    config = QuantizeConfig(target="qnn", bits="8/16/16", equalize=False, threads=1)
    rules = make_quantizer(Plan(model, blocks, find_sites(model, blocks, whole=True), config)).rules
    sites = find_sites(model, blocks, whole=True)
    bits = {sites[t].role: r.bits for t, r in rules.items() if not sites[t].is_parameter}
    assert (bits["k"], bits["v"]) == (8, 8)
    assert {bits[role] for role in ("q", "softmax", "av", "residual1", "norm1")} == {16}


def test_more_bits_leave_second_factors_at_eight_and_say_so() -> None:
    model = transformer(Choices(packed=False))
    blocks, sites = find_blocks(model), find_sites(model, find_blocks(model), whole=True)
    config = QuantizeConfig(target="qnn", mixed=False, more_bits=("k=16", "q=16"), equalize=False)
    quantizer = make_quantizer(Plan(model, blocks, sites, config))
    bits = {sites[t].role: r.bits for t, r in quantizer.rules.items() if not sites[t].is_parameter}
    assert (bits["q"], bits["k"], bits["v"]) == (16, 8, 8)
    assert [n for n in quantizer.notes if "k and v keep 8 bits" in n]


def test_nothing_below_where_gelu_is_zero_has_codes() -> None:
    model = transformer(Choices())
    blocks = find_blocks(model)
    config = QuantizeConfig(target="qnn", mixed=False, equalize=False, threads=1)
    sites = find_sites(model, blocks, whole=True)
    quantizer = make_quantizer(Plan(model, blocks, sites, config))
    specs = quantizer.calibrate([tokens(8) * np.float32(30)])
    (low,) = [s.clip[0] for t, s in specs.items() if sites[t].role == "fc1"]
    assert -4.6 <= low <= -4.4


def test_auto_gives_sixteen_bits_where_they_are_needed(tmp_path: Path) -> None:
    """Each decision is needed, the cost is its share of all elements, and the options found make
    the same file."""
    path = image_model(tmp_path / "float.onnx")
    pictures = np.random.default_rng(0).normal(size=(48, 3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "images.npy", pictures)
    same: dict[str, Any] = {
        "calib": tmp_path / "images.npy", "target": "qnn", "threads": 1, "report": False,
        "images": 40,
    }  # fmt: skip
    plain = quantize(path, output=tmp_path / "plain", auto=True, min_sqnr=-1000, **same).report
    bound = plain["auto"]["before"]["sqnr_db"] + 1
    found = quantize(path, output=tmp_path / "auto", auto=True, min_sqnr=bound, **same).report
    auto = found["auto"]
    assert auto["met"]
    assert auto["decisions"]
    assert {one["decision"] for one in auto["decisions"]} == {"16 bits"}
    assert auto["keep_float"] == []
    assert all(text.endswith("=16") for text in auto["more_bits"])
    assert auto["before"]["sqnr_db"] < bound <= auto["after"]["sqnr_db"]
    rows = found["tensors"]
    acts = [t for t in rows if not t["parameter"]]
    assert {t["bits"] for t in acts} == {8, 16}
    assert 0 < auto["cost"] < 100
    again = tmp_path / "again"
    quantize(path, output=again, mixed=False, more_bits=tuple(auto["more_bits"]), **same)
    name = "quantized.onnx"
    assert (again / name).read_bytes() == (tmp_path / "auto" / name).read_bytes()
