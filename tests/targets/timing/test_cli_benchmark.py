"""The command: its table, its JSON, and what it refuses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from ptq_onnx.cli import app as cli

MODEL = Path(__file__).resolve().parents[3] / "models" / "digits_vit.onnx"


def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["ptq-onnx", "benchmark", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    text = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, text.out, text.err


QUICK = ("--batch", "1,2", "--seconds", "0", "--threads", "1")


def test_table_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(
        capsys, monkeypatch, MODEL, MODEL, *QUICK, "--json", "--output", "b.json"
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert json.loads(Path("b.json").read_text()) == found
    assert os.listdir() == ["b.json"]
    assert [(t["batch"], t["bytes"]) for t in found["timings"]] == [
        (b, MODEL.stat().st_size) for b in (1, 1, 2, 2)
    ]
    assert all(t["median_ms"] > 0 and t["peak_memory_bytes"] != 0 for t in found["timings"])
    assert (found["runtime"], found["threads"]) == ("onnxruntime", 1)
    assert [t["same_as"] for t in found["timings"]] == [None, "digits_vit.onnx"] * 2
    assert "are the same file" in found["notes"][0]
    code, out, err = command(capsys, monkeypatch, MODEL, *QUICK, "--batch", "1")
    assert (code, err) == (0, "")
    for word in ("digits_vit.onnx", "images/s", "speed-up", "1.00×", "1.28", "CPU, 1 thread "):
        assert word in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Missing argument"),
        (("nix.onnx",), "nix.onnx does not exist"),
        ((MODEL, "--batch", "1,x"), "as in 1,8,32"),
        ((MODEL, "--batch", "0"), "as in 1,8,32"),
        ((MODEL, "--batch", "²"), "as in 1,8,32"),
        ((MODEL, "--runtime", "nix"), "onnxruntime, openvino, tensorrt"),
        ((MODEL, "--threads", "-1"), "--threads"),
        ((MODEL, "--seconds", "-1"), "--seconds"),
        ((MODEL, "--output", "."), "--output"),
        ((MODEL, "--output", "nix/b.json"), "--output"),
        ((MODEL.with_name("train_digits.py"),), "not an ONNX file"),
    ],
)
def test_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: tuple[object, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, monkeypatch, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert os.listdir() == []
