"""The file of a sweep and its cells: what is read, what is refused, in one line."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ptq_onnx.errors import ConfigError
from ptq_onnx.sweep.matrix import AXES, Sweep, cells_of, varied
from ptq_onnx.sweep.matrix_file import read_sweep
from ptq_onnx.sweep.timm_table import preprocessing_of


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Three models, of which one lies deeper, and two folders of images."""
    for name in ("a/vit_s.onnx", "a/vit_b.onnx", "a/b/deit.onnx", "calib/1.png", "val/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "val.txt").write_text("1.png 0\n")
    return tmp_path


def read(base: Path, text: str) -> Sweep:
    (base / "s.yaml").write_text(text)
    return read_sweep(base / "s.yaml")


WHOLE = """
models:
  - a/**/*.onnx
  - {path: a/b/deit.onnx, name: deit-own, preprocess: imagenet, crop_pct: 0.9}
recipes: [deploy, {name: gptq, quantizer: deploy, rounding: gptq, keep_float: [head]}, fqvit]
targets: [onnxruntime, tensorrt]
bits: [8/8/8, 4/4/4]
calib: [calib, {path: noise, images: 16}, {name: few, path: calib, images: 4}]
seeds: [even, 0, 7]
val: val
labels: val.txt
options: {images: 64, report: false, threads: 2}
exclude:
  - {model: "vit*", seed: [0, 7]}
  - {recipe: gptq, bits: 4/4/4, target: tensorrt}
retries: 3
"""


def test_the_whole_matrix(base: Path) -> None:
    sweep = read(base, WHOLE)
    assert [e.name for e in sweep.axes["model"]] == ["deit-own", "vit_b", "vit_s"]
    cells = cells_of(sweep)
    # 3 models x 3 recipes x 2 targets x 2 bits x 3 sets x 3 seeds, two models without two seeds,
    # and one of the twelve (recipe, target, bits) left out of what remains
    assert len(cells) == 3 * 12 * 9 - 2 * 12 * 6 - (9 + 2 * 3)
    assert len({cell.name for cell in cells}) == len(cells)
    assert sweep.retries == 3
    one = next(c for c in cells if c.name == "deit-own/gptq_onnxruntime_4-4-4_few_7")
    assert dict(one.axes) == dict(
        zip(AXES, ("deit-own", "gptq", "onnxruntime", "4/4/4", "few", "7"), strict=True)
    )
    assert one.config is not None
    found = one.config
    assert (found.quantizer, found.rounding, found.keep_float) == ("deploy", "gptq", ("head",))
    assert (found.bits, found.images, found.seed, found.threads) == ("4/4/4", 4, 7, 2)
    assert (found.preprocess, found.crop_pct, found.report) == ("imagenet", 0.9, False)
    assert one.model == base / "a/b/deit.onnx"
    assert (one.calib, one.val, one.labels) == (
        str(base / "calib"), str(base / "val"), str(base / "val.txt"),
    )  # fmt: skip
    even = next(c for c in cells if c.name == "vit_s/deploy_onnxruntime_8-8-8_noise_even")
    assert even.config is not None
    assert (even.calib, even.config.seed, even.config.images) == ("noise", None, 16)


def test_pairs_that_do_not_go_together_are_refused_with_the_reason(base: Path) -> None:
    cells = cells_of(read(base, WHOLE))
    refused = {(c.axes["recipe"], c.axes["target"]) for c in cells if c.config is None}
    assert refused == {("fqvit", "tensorrt")}
    reason = next(c.refusal for c in cells if c.config is None)
    assert reason is not None
    assert "TensorRT" in reason
    assert varied(cells) == list(AXES)


def test_what_may_be_left_out(base: Path) -> None:
    (cell,) = cells_of(read(base, "models: a/vit_s.onnx\nbits: 8/8/4"))
    assert cell.name == "vit_s/default_onnxruntime_8-8-4_own_even"
    assert cell.config is not None
    assert (cell.config.quantizer, cell.config.threads, cell.config.report) == ("deploy", 1, True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models: a/*.onnx\nmethods: [mse]", "unknown 'methods'; known are models, recipes"),
        ("recipes: deploy", "models: nothing is named"),
        ("models: a/nix*.onnx", "models: there is no file a/nix*.onnx in"),
        ("models: [[a]]", "models: expected names, got a list"),
        ("models: {path: a/*.onnx, name: x}", "models: name 'x' is for 2 files"),
        ("models: [{path: a/vit_s.onnx, name: x}, {path: a/vit_b.onnx, name: x}]",
         "model: two entries are called 'x'"),
        ("models: {path: a/vit_s.onnx, quantizer: deploy}", "models: unknown 'quantizer'"),
        ("models: {path: a/vit_s.onnx, mean: [9, 9, 9]}", "models: --mean 9: must be from -1 to 1"),
        ("models: {path: a/vit_s.onnx, name: ../x}", "models: '../x' cannot name a folder"),
        ("recipes: deploi\nmodels: a/*.onnx", "There is no quantizer 'deploi'; choose one of"),
        ("recipes: {name: x, rounding: odd}\nmodels: a/*.onnx", "recipes: x: There is no rounding"),
        ("recipes: {name: x, target: qnn}\nmodels: a/*.onnx",
         "target is an axis: name it under 'targets:'"),
        ("recipes: {name: x, imagse: 3}\nmodels: a/*.onnx", "did you mean images?"),
        ("targets: cpu\nmodels: a/*.onnx", "There is no target 'cpu'"),
        ("bits: 8\nmodels: a/*.onnx", "bits: --bits 8: expected weights/activations/attention"),
        ("bits: 1/8/8\nmodels: a/*.onnx", "bits: bits: weights must be a whole number from 2"),
        ("calib: nix\nmodels: a/*.onnx", "nix does not exist"),
        ("calib: {path: calib, images: 0}\nmodels: a/*.onnx", "calib: --images must be at least 1"),
        ("seeds: [-1]\nmodels: a/*.onnx", "seeds: --seed must be at least 0, got -1"),
        ("seeds: [0, 0]\nmodels: a/*.onnx", "seed: two entries are called '0'"),
        ("labels: val.txt\nmodels: a/*.onnx", "labels without val"),
        ("options: {bits: 4/4/4}\nmodels: a/*.onnx", "bits is an axis"),
        ("options: {threads: 0}\nmodels: a/*.onnx", "threads must be at least 1 here"),
        ("options: [x]\nmodels: a/*.onnx", "options: expected options (name: value), got a list"),
        ("exclude: {quantizer: x}\nmodels: a/*.onnx", "exclude: unknown 'quantizer'; known are"),
        ("exclude: {recipe: x}\nmodels: a/*.onnx", "exclude (recipe: x) fits no cell"),
        ("exclude: {model: '*'}\nmodels: a/*.onnx", "The sweep has no cells"),
        ("retries: 99\nmodels: a/*.onnx", "retries: must be from 0 to 20, got 99"),
        ("recipes: fqvit\ntargets: tensorrt\nmodels: a/*.onnx", "Every cell is refused, the first"),
        ("models: &a [x]\nrecipes: *a", "is not YAML"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(base: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cells_of(read(base, text))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_many_cells(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq_onnx.sweep.matrix.MOST_CELLS", 8)
    with pytest.raises(ConfigError, match="has 9 cells; at most 8"):
        cells_of(read(base, "models: a/**/*.onnx\nseeds: [1, 2, 3]"))


def test_timm_knows_the_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = types.SimpleNamespace(
        mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=0.9, interpolation="bicubic"
    )
    known = {"vit_x": table}
    fake: Any = types.ModuleType("timm.models")
    fake.get_pretrained_cfg = known.get
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.models", fake)
    assert preprocessing_of("timm/vit_x") == {
        "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_pct": 0.9,
        "interpolation": "bicubic",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="timm has no such model"):
        preprocessing_of("vit_y")
