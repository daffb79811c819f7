"""No command writes over what it reads, and a run leaves nothing of the one before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ptq_onnx.cli.app import main
from ptq_onnx.errors import ConfigError
from ptq_onnx.files.output_paths import Output

ROOT = Path(__file__).resolve().parents[2]
MODEL = next((ROOT / "models").glob("*.onnx"))
CALIB = ROOT / "img/digits/calib"
QUICK = ("--calib", CALIB, "--images", "8", "--threads", "1", "--no-report")


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ptq-onnx", *map(str, words)])
    with pytest.raises(SystemExit) as raised:
        main()
    assert isinstance(raised.value.code, int)
    return raised.value.code


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_run_replaces_the_one_before_and_spares_what_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    quantize = ("quantize", MODEL, *QUICK)
    small = ("--report", "--no-pictures", "--analysis-images", "4")
    assert command(monkeypatch, *quantize[:-1], *small) == 0
    out = tmp_path / "output"
    assert {"report.html", "fused.onnx", "quantized.onnx", ".ptq_onnx.json"} <= names(out)
    (out / "mine.txt").write_text("mine")
    assert command(monkeypatch, *quantize, "--quantizer", "vanilla") == 0
    assert "report.html" not in names(out)
    assert (out / "mine.txt").read_text() == "mine"
    before = {name: (out / name).read_bytes() for name in names(out)}
    capsys.readouterr()

    refused: list[tuple[tuple[object, ...], str]] = [
        (("quantize", "output/fused.onnx", *QUICK), "the model output/fused.onnx"),
        ((*quantize, "--config", "output/config.yaml"), "--config output/config.yaml"),
        (
            (*quantize, "--quantizer", "vanilla", "--scales", "output/report.json"),
            "--scales output/report.json",
        ),
        (("analyse", MODEL, *QUICK[:-1], "--output", "output"), "holds a quantized model"),
        (
            (
                *("benchmark", MODEL, "output/quantized.onnx"),
                *("--output", "output/quantized.onnx"),
            ),
            "is a model to be timed",
        ),
        ((*quantize, "--output", MODEL), "is the model itself"),
    ]
    for words, text in refused:
        assert command(monkeypatch, *words) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
    assert {name: (out / name).read_bytes() for name in names(out)} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["output"]


def test_folders_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "out/attention").mkdir(parents=True)
    (tmp_path / "out/mine").mkdir()
    (tmp_path / "out/attention/block_00_a.png").write_bytes(b"")
    place = Output.at(tmp_path / "out")
    place.keep(calib=tmp_path / "out/mine", val=tmp_path, model=None, labels=b"bytes")
    with pytest.raises(ConfigError, match=r"--calib .* would be overwritten"):
        place.keep(calib=tmp_path / "out/attention")
