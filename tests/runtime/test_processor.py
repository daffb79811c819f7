"""Whether this processor's int8 sums saturate, and what a run says of it."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

import ptq_onnx
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError
from ptq_onnx.numerics.pair_sums import MOST, pair_sums
from ptq_onnx.pipeline import writing
from ptq_onnx.pipeline.writing import on_this_processor
from ptq_onnx.runtime.processor import sums_saturate
from ptq_onnx.targets.checking.check import check

MODEL = Path(__file__).resolve().parents[2] / "models/digits_vit.onnx"
OLD = "processor: 0\nflags : fpu avx2 avx512bw\n"


@pytest.mark.parametrize(
    ("machine", "text", "saturate"),
    [
        ("x86_64", OLD, True),
        ("AMD64", OLD, True),
        ("x86_64", OLD.replace("avx2", "avx2 avx_vnni"), False),
        ("x86_64", OLD.replace("avx2", "avx512_vnni"), False),
        ("x86_64", OLD.replace("avx2", "amx_int8"), False),
        ("x86_64", "nothing", False),
        ("aarch64", OLD, False),
    ],
)
def test_by_the_flags(tmp_path: Path, machine: str, text: str, saturate: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert sums_saturate(machine, tmp_path / "cpuinfo") is saturate
    assert sums_saturate("x86_64", tmp_path / "none") is False


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, True),
        ({"quantizer": "fqvit"}, True),
        ({"cpu": "older"}, False),
        ({"bits": "7/8/8"}, False),
        ({"weights": 4}, False),
        ({"target": "openvino"}, False),
        ({"target": "integer"}, False),
    ],
)
def test_a_note_where_they_do(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], told: bool
) -> None:
    monkeypatch.setattr(writing, "sums_saturate", lambda: True)
    notes = on_this_processor(QuantizeConfig(**options))
    assert [note[:31] for note in notes] == ["This processor has no VNNI: ONN"] * told
    monkeypatch.setattr(writing, "sums_saturate", lambda: False)
    assert on_this_processor(QuantizeConfig(**options)) == []


def test_only_for_onnxruntime() -> None:
    with pytest.raises(ConfigError, match="--cpu older with --target tensorrt: it is for the kern"):
        QuantizeConfig(target="tensorrt", cpu="older")


def test_a_file_for_older_processors(short: Path, tmp_path: Path) -> None:
    """No linear of it can saturate, and nothing else changes."""
    found = {}
    for cpu in ("vnni", "older"):
        ptq_onnx.quantize(MODEL, images=16, cpu=cpu, report=False, threads=1, output=tmp_path / cpu)
        file = tmp_path / cpu / "quantized.onnx"
        found[cpu] = check(file, "onnxruntime").facts["without VNNI"]
        report = json.loads((tmp_path / cpu / "report.json").read_text())
        assert report["fidelity"]["sqnr_db"] > 25
    assert found["vnni"]["may saturate"] > 20
    assert found["older"] == {"may saturate": 0, "never": 38}
    weights = [t for t in onnx.load(file).graph.initializer if t.data_type == onnx.TensorProto.INT8]
    sums = [pair_sums(onnx.numpy_helper.to_array(t)) for t in weights if len(t.dims) == 2]
    assert len(sums) == found["older"]["never"]
    assert max(int(one.max()) for one in sums) <= MOST
