"""A refusal names the cause, what was asked for, and a way out; `analyse` takes what it advises."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from fuzz.cases import command
from fuzz.oracle import Outcome, judge
from fuzz.seeds import no_transformer, vit
from onnx import numpy_helper
from PIL import Image

FEW = ("--calib", "noise", "--images", "2", "--threads", "1")


def call(model: onnx.ModelProto, folder: Path, *words: str) -> Outcome:
    onnx.save(model, folder / "model.onnx")
    found = judge(lambda: command(words[0], "model.onnx", *FEW, *words[1:]), folder)
    assert found.finding == ""
    return found


def two_images() -> onnx.ModelProto:
    """A plain ViT for two images at a time, each with position embeddings of its own."""
    model = vit(batch=2)
    for tensor in model.graph.initializer:
        table = numpy_helper.to_array(tensor)
        if table.shape == (1, 6, 8):
            both = np.concatenate([table, table + 0.3])
            tensor.CopyFrom(numpy_helper.from_array(both, tensor.name))
    return model


def test_a_batch_is_no_window(tmp_path: Path) -> None:
    found = call(two_images(), tmp_path, "quantize", "--target", "integer")
    assert found.code == 2
    assert "depends on its batch size of 2 in a way that cannot be undone" in found.text
    assert "Swin" not in found.text


@pytest.mark.parametrize("target", ["integer", "tensorrt", "openvino"])
def test_what_works_without_a_block(target: str, tmp_path: Path) -> None:
    found = call(no_transformer(), tmp_path, "quantize", "--target", target)
    assert found.code == 2
    assert f"--target {target} needs one, --target onnxruntime --quantizer vanilla" in found.text


@pytest.mark.parametrize("option", [("--precision", "fp8"), ("--float16",), ("--centre-values",)])
def test_analyse_takes_the_target_that_it_asks_for(option: tuple[str, ...], tmp_path: Path) -> None:
    refused = call(vit(), tmp_path, "analyse", *option)
    assert refused.code == 2
    assert "use --target tensorrt" in refused.text
    more = ("--no-sensitivity", "--no-pictures", "--analysis-images", "1", "-o", "output")
    assert call(vit(), tmp_path, "analyse", *option, "--target", "tensorrt", *more).code == 0


def test_analyse_lists_what_costs_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(vit(), tmp_path / "model.onnx")
    (tmp_path / "in").mkdir()
    Image.effect_noise((12, 8), 50).convert("RGB").save(tmp_path / "in/a.png")
    monkeypatch.chdir(tmp_path)
    words = ("--calib", "in", "--threads", "1", "--quantizer", "vanilla", "--no-pictures")
    command("analyse", "model.onnx", *words, "-o", "output")
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "output/report.json").read_text())
    layers = report["analysis"]["sensitivity"]["layerwise"]
    alone = [one for one in layers if (one["scope"], one["part"]) == ("op", "all")]
    worst = max(alone, key=lambda one: one["error"]["snr"])
    table = out[out.index("Modules that cost most") :].splitlines()
    (row,) = [line for line in table[4:] if line.strip()][:1]
    assert row.split()[0] == worst["module"]
    assert f"{worst['error']['snr_db']:.1f} dB" in row
