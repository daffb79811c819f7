"""``--rotate`` in whole runs: the file, the report, and what excludes it."""

import json
from pathlib import Path

import pytest

import ptq_onnx
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.equalization.rotation_choice import Turns
from ptq_onnx.equalization.streams import Refused
from ptq_onnx.errors import ConfigError
from ptq_onnx.pipeline.rotation_notes import notes_on
from ptq_onnx.pipeline.streams import codes_of
from ptq_onnx.preparation.prepare import prepare
from ptq_onnx.quantizers.base import Plan
from ptq_onnx.quantizers.by_name import make_quantizer

ROOT = Path(__file__).resolve().parents[2]
MODEL, IMAGES = ROOT / "models/digits_vit.onnx", ROOT / "img/digits/calib"


def quantized(folder: Path, calib: object = IMAGES, **options: object) -> dict[str, object]:
    ptq_onnx.quantize(
        MODEL, calib=calib, images=32, report=False, threads=1, output=folder, **options
    )
    return json.loads((folder / "report.json").read_text())


def test_on_with_a_quantized_residual(tmp_path: Path) -> None:
    report = quantized(tmp_path / "a", target="tensorrt", quantize_residual=True)
    (turned,) = report["rotation"]["turned"]
    assert report["rotation"]["refused"] == []
    assert (turned["width"], turned["tensors"]) == (64, 13)
    assert turned["stream_db"] > 1
    assert report["parity"]["rewritten"] < 1e-4
    assert report["formed"] == "formed.onnx"
    plain = quantized(tmp_path / "b", target="tensorrt", quantize_residual=True, rotate=False)
    assert plain["rotation"] is None
    assert len(plain["tensors"]) == len(report["tensors"])


def test_one_scale_for_each_tensor_of_a_turned_stream(tmp_path: Path) -> None:
    report = quantized(tmp_path / "a", quantizer="fqvit", rotate=True, ptf=False)
    assert report["rotation"]["turned"][0]["by"] in ("spread", "spread, then flattened")
    stream = [t for t in report["tensors"] if t["role"] in ("embed", "residual1", "residual2")]
    assert len(stream) == 13
    assert {t["granularity"] for t in stream} == {"tensor"}


@pytest.mark.parametrize(("calib", "learns"), [(IMAGES, True), ("noise", False)])
def test_few_bits_learn_the_turn_from_pictures_that_a_camera_took(
    calib: object, learns: bool, tmp_path: Path
) -> None:
    report = quantized(tmp_path, calib, quantizer="lowbit", bits="4/4/4")
    (turned,) = report["rotation"]["turned"]
    assert (turned["by"] == "learned") is learns
    assert (turned["loss_db"] > 0.5) is learns
    assert report["parity"]["rewritten"] < 1e-4


def test_factors_searched_where_they_hold_a_stream_better(tmp_path: Path) -> None:
    report = quantized(tmp_path / "a", quantizer="fqvit", rotate=True)
    (stays,) = report["rotation"]["turned"]
    assert stays["by"] == "none: factors per channel"
    assert stays["stream_db"] > 0
    stream = [t for t in report["tensors"] if t["role"] in ("embed", "residual1", "residual2")]
    assert {t["granularity"] for t in stream} == {"ptf"}
    assert any("searched factors per channel the outputs lose" in n for n in report["notes"])
    plain = quantized(tmp_path / "b", quantizer="fqvit", rotate=False)
    before = {t["tensor"]: t["scale"] for t in plain["tensors"]}
    assert sum(before[t["tensor"]] != t["scale"] for t in stream) == 13


def test_scales_per_channel_are_calibrated_on_a_turned_stream(tmp_path: Path) -> None:
    """The range that was searched is one scale's; channelwise has one for each channel."""
    report = quantized(tmp_path / "a", quantizer="channelwise", rotate=True)
    assert report["rotation"]["turned"][0]["by"] != "none"
    stream = [t for t in report["tensors"] if t["role"] in ("embed", "residual1", "residual2")]
    assert len(stream) == 13
    assert all(t["granularity"] == "channel" and t["factor"]["shape"] == [64] for t in stream)


@pytest.mark.parametrize(
    ("quantizer", "target", "symmetric"),
    [
        ("vanilla", "onnxruntime", True),
        ("channelwise", "onnxruntime", True),
        ("ptq4vit", "onnxruntime", True),
        ("fqvit", "onnxruntime", False),
        ("deploy", "onnxruntime", False),
        ("deploy", "tensorrt", True),
    ],
)
def test_ranges_are_searched_for_the_codes_that_are_written(
    quantizer: str, target: str, symmetric: bool
) -> None:
    prepared = prepare(MODEL)
    config = QuantizeConfig(quantizer=quantizer, target=target)
    plan = Plan(prepared.model, prepared.blocks, prepared.sites, config)
    assert codes_of(plan, make_quantizer(plan).rules).symmetric is symmetric


def test_one_note_for_all_that_stays() -> None:
    """A norm on q and k in every block would be two dozen."""
    refused = tuple(Refused(f"norm{k}", f"reason {k}") for k in range(24))
    first, last = notes_on(Turns((), refused, {}, ()))
    assert "'norm0' stays as it is: reason 0 (23 more stay too" in first
    assert last == "Rotation: no residual stream was turned."


def test_what_excludes_it(tmp_path: Path) -> None:
    options = {"target": "tensorrt", "precision": "fp8", "rotate": True}
    with pytest.raises(ConfigError, match="--rotate with --precision"):
        ptq_onnx.quantize(
            MODEL, calib=IMAGES, images=8, report=False, output=tmp_path / "x", **options
        )
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def turned_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stream has one scale, so that it is turned by a matrix."""
    folder = tmp_path_factory.mktemp("turned") / "a"
    report = quantized(folder, quantizer="fqvit", ptf=False)
    (turned,) = report["rotation"]["turned"]
    assert turned["by"] == "spread, then flattened"
    assert len(turned["direction"]) == turned["width"] == 64
    return folder


def test_an_earlier_run_s_rotation_is_done_again(turned_run: Path, tmp_path: Path) -> None:
    """Not chosen anew: the same file, bit for bit."""
    ptq_onnx.quantize(
        MODEL, scales=turned_run / "report.json", report=False, quantizer="fqvit", ptf=False,
        images=32, threads=1, output=tmp_path / "b",
    )  # fmt: skip
    notes = json.loads((tmp_path / "b/report.json").read_text())["notes"]
    assert any("was turned (spread, then flattened)" in note for note in notes)
    name = "quantized.onnx"
    assert (tmp_path / "b" / name).read_bytes() == (turned_run / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        ({}, {"rotate": False}, "is of a run with --rotate: use it here too, or calibrate anew"),
        ({"direction": [0.5] * 63}, {}, "its residual streams are not those of this model"),
        ({"direction": [0.5] * 63 + [float("nan")]}, {}, "its residual streams are not those"),
        ({"seed": -1}, {}, "its residual streams are not those of this model"),
        ({"width": 32}, {}, "its residual streams are not those of this model"),
        ({"stream": "other"}, {}, "its residual streams are not those of this model"),
        ({"by": "magic"}, {}, "is not a report.json of this tool: rotation.turned.0.by"),
    ],
)
def test_a_rotation_that_does_not_fit(
    turned_run: Path, tmp_path: Path, change: dict[str, object], options: dict[str, object],
    text: str,
) -> None:  # fmt: skip
    report = json.loads((turned_run / "report.json").read_text())
    report["rotation"]["turned"][0] |= change
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ConfigError, match=text):
        ptq_onnx.quantize(
            MODEL, scales=tmp_path / "report.json", report=False, quantizer="fqvit", ptf=False,
            output=tmp_path / "b", **options,
        )  # fmt: skip
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "turns"),
    [
        ({"quantizer": "lowbit", "bits": "4/4/4"}, True),
        ({"quantizer": "lowbit", "bits": "6/6/6"}, True),
        ({"quantizer": "lowbit", "bits": "4/8/8"}, False),
        ({"quantizer": "lowbit", "bits": "4/8/8", "rotate": True}, True),
        ({"quantizer": "lowbit", "bits": "8/7/8"}, True),
        ({"quantizer": "lowbit", "bits": "4/4/4", "rotate": False}, False),
        ({"quantizer": "deploy", "bits": "4/4/4"}, False),
        ({"quantizer": "fqvit"}, True),
        ({"quantizer": "fqvit", "target": "integer"}, True),
        ({"quantizer": "fqvit", "rotate": False}, False),
        ({"quantizer": "channelwise"}, False),
        ({"target": "qnn"}, True),
    ],
)
def test_where_it_is_on_by_itself(options: dict[str, object], turns: bool) -> None:
    assert QuantizeConfig(**options).rotates is turns
