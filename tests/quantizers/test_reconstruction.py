"""Trained blocks: what they gain, that nothing gets worse, bounds in time, and stopped runs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepared_models import DIGITS, ROOT, decibels, images, quantized
from short_digits import short_digits

from ptq_onnx.config.bits import Bits
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.engine import learned
from ptq_onnx.engine.simulator import Simulator
from ptq_onnx.errors import ConfigError
from ptq_onnx.numerics.fake_quantize import dequantize, quantize
from ptq_onnx.quantizers import finished_blocks, reconstruction, stream_weights
from ptq_onnx.quantizers.base import SiteQuantizer
from ptq_onnx.quantizers.lowbit import LowBit

FEW, BLOCKS, BATCH = 50, 2, 8


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "STEPS", {"cpu": FEW, "cuda": 100})
    monkeypatch.setattr(reconstruction, "LONGER", 1)
    monkeypatch.setattr(reconstruction, "IMAGES", BATCH)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> SiteQuantizer:
    """Two blocks of the digits' model, not trained."""
    path = short_digits(tmp_path_factory.mktemp("two") / "two.onnx", BLOCKS)
    return trained(quantized(path, images(), quantizer="lowbit", bits="2/4/4"), False)


def trained(
    plain: SiteQuantizer, trains: bool = True, kept: Path | None = None, **options: Any
) -> LowBit:
    """The same, its blocks trained."""
    config = replace(plain.plan.config, reconstruct=trains, **options)
    found = LowBit(replace(plain.plan, config=config, kept=kept))
    x = images()
    found.run(torch.zeros(1, *x.shape[1:]), [x[i : i + BATCH] for i in range(0, len(x), BATCH)])
    return found


@pytest.fixture(scope="module")
def once(plain: SiteQuantizer) -> LowBit:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "STEPS", {"cpu": FEW, "cuda": 100})
        patch.setattr(reconstruction, "LONGER", 1)
        patch.setattr(reconstruction, "IMAGES", BATCH)
        return trained(plain)


def numbers(quantizer: SiteQuantizer) -> dict[str, Any]:
    """All constants and steps."""
    values = quantizer.model.graph.initializers.items()
    found = {n: np.array(v.const_value.numpy()) for n, v in values if v.const_value is not None}
    return found | {f"step of {t}": s.scale for t, s in quantizer.specs.items()}


def assert_same(one: SiteQuantizer, other: SiteQuantizer) -> None:
    first, second = numbers(one), numbers(other)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_it_is_nearer_on_images_that_it_did_not_see(plain: SiteQuantizer, once: LowBit) -> None:
    """The logits, on pictures of the other folder."""
    x = images(DIGITS, ROOT / "img/digits/val", 32)
    name = str(plain.model.graph.outputs[0].name)
    real = Simulator(plain.plan.model, threads=1).run(x, [name])[name]
    before, after = (
        decibels(Simulator(q.model, q, threads=1).run(x, [name])[name], real) for q in (plain, once)
    )
    assert after > before + 0.5


def test_no_block_is_worse_on_the_images_held_apart(once: LowBit) -> None:
    assert [one.block for one in once.trained] == ["blocks.0", "blocks.1"]
    assert all(one.kept and one.after < one.before for one in once.trained)
    assert all(one.steps == FEW for one in once.trained)


def test_weights_stay_codes_of_their_steps(plain: SiteQuantizer, once: LowBit) -> None:
    quantizer = once
    changed = 0
    for name, spec in quantizer.specs.items():
        if not quantizer.plan.sites[name].is_parameter:
            continue
        value = quantizer.model.graph.initializers[name].const_value
        assert value is not None
        weight = np.asarray(value.numpy(), np.float32)
        np.testing.assert_allclose(dequantize(quantize(weight, spec), spec), weight, atol=1e-6)
        changed += not np.array_equal(spec.scale, plain.specs[name].scale)
    assert changed >= 6


def test_what_does_not_help_is_not_kept(
    plain: SiteQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps far too large, all is as without training, and a note says so."""
    monkeypatch.setattr(learned, "RATES", dict.fromkeys(learned.RATES, 1.0))
    found = trained(plain)
    assert not any(one.kept for one in found.trained)
    assert_same(found, plain)
    (note,) = [n for n in found.notes if "stay as they were" in n]
    assert note.startswith("--reconstruct: blocks.0, blocks.1")


def test_same_images_same_numbers(plain: SiteQuantizer, once: LowBit) -> None:
    assert_same(trained(plain), once)


def test_a_stopped_run_goes_on_where_it_was(
    plain: SiteQuantizer, once: LowBit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    write = finished_blocks.FinishedBlocks.keep

    def stopped(self: Any, key: str, learning: Any) -> None:
        write(self, key, learning)
        if learning.trained.block == "blocks.0":
            raise KeyboardInterrupt

    monkeypatch.setattr(finished_blocks.FinishedBlocks, "keep", stopped)
    with pytest.raises(KeyboardInterrupt):
        trained(plain, kept=kept)
    assert len(list(kept.iterdir())) == 1
    monkeypatch.setattr(finished_blocks.FinishedBlocks, "keep", write)
    again = trained(plain, kept=kept)
    assert [one.resumed for one in again.trained] == [True, False]
    assert "--reconstruct: 1 block was taken from a run that was stopped." in again.notes
    assert_same(again, once)
    assert len(list(kept.iterdir())) == BLOCKS


def test_what_is_not_whole_is_learned_again(tmp_path: Path) -> None:
    finished = finished_blocks.FinishedBlocks(tmp_path)
    (tmp_path / "key.npz").write_bytes(b"PK\x03\x04 cut off")
    assert finished.find("key") is None
    assert finished.find("other") is None


class Clock:
    """A second for every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_the_minutes_are_kept(plain: SiteQuantizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block gets its share of them, and has fewer steps than it would."""
    clock = Clock()
    timed = partial(reconstruction.Reconstruction, clock=clock)
    monkeypatch.setattr(stream_weights, "Reconstruction", timed)
    found = trained(plain, minutes=0.3)
    assert clock.now <= 1 + 18 + 1  # its own look at first, and one step
    assert all(0 < one.steps < FEW for one in found.trained)
    (note,) = [n for n in found.notes if n.startswith("--minutes 0.3: blocks.0, ")]
    assert note.endswith(f"had fewer than {FEW} steps; another run may differ.")


@pytest.mark.parametrize(
    ("bits", "device", "steps"),
    [
        ("4/4/4", "cpu", 80),
        ("4/8/8", "cpu", 80),
        ("8/8/3", "cpu", 80),
        ("3/8/8", "cpu", 240),
        ("4/3/4", "cpu", 240),
        ("3/3/3", "cuda", 2000),
    ],
)
def test_few_bits_have_more_steps(
    bits: str, device: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert reconstruction.steps_for(Bits.parse(bits), device) == steps


def test_without_time_nothing_is_trained(
    plain: SiteQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        stream_weights, "Reconstruction", partial(reconstruction.Reconstruction, clock=Clock())
    )
    found = trained(plain, minutes=0.01)
    assert [one.steps for one in found.trained] == [0] * BLOCKS
    assert_same(found, plain)


def test_a_gpu_is_used_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [reconstruction.device_for(d) for d in ("auto", "cpu", "cuda")] == ["cpu", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reconstruction.device_for("cuda") == "cpu"


def test_a_gpu_that_torch_does_not_have_is_told(
    plain: SiteQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = replace(plain.plan, config=replace(plain.plan.config, device="cuda"))
    found = reconstruction.Reconstruction(plan, [images()[:8], images()[8:16]])
    assert found.notes == ["--device cuda: torch has no CUDA here; blocks are trained on the CPU."]


def test_an_op_that_torch_cannot_run_is_told(
    plain: SiteQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise NotImplementedError("no such form\nof it")

    monkeypatch.setattr(reconstruction, "output_weights", fails)
    found = reconstruction.Reconstruction(plain.plan, [images()[:2], images()[2:4]])
    assert found.weights == {}
    assert found.notes == ["--reconstruct: errors count the same everywhere; torch: no such form."]


def test_one_batch_is_too_few(plain: SiteQuantizer) -> None:
    with pytest.raises(ConfigError, match=r"^--reconstruct: [^\n]+ a smaller --batch\.$"):
        reconstruction.Reconstruction(plain.plan, [images()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": "deploy", "reconstruct": True},
         r"^--reconstruct belongs to the quantizer lowbit, not deploy\.$"),
        ({"quantizer": "lowbit", "minutes": 3.0},
         r"^--minutes 3 bounds --reconstruct: add that\.$"),
        ({"quantizer": "lowbit", "reconstruct": True, "target": "tensorrt"},
         r"^--target tensorrt, quantizer lowbit: [^\n]+$"),
    ],
)  # fmt: skip
def test_where_it_makes_no_sense_one_line_says_so(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizeConfig(**options)
