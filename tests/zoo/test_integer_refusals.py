"""What the integer target does not cover is refused in one line that names node and op."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ptq_onnx.cli import app as cli
from zoo.architectures import ARCHITECTURES
from zoo.cells import Cell, write

REFUSED = {
    "swinv2": "(L2Normalization): the integer target has no integer form of this op.",
    "vit_rope": "(Linear): its output is reshaped before",
}


@pytest.mark.parametrize("name", REFUSED)
def test_on_the_command_line(
    name: str,
    exports: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(Cell(name, "ts17"), exports)
    output = tmp_path / "out"
    words = ["--target", "integer", "--size", ARCHITECTURES[name].size, "--calib", "noise",
             "--images", 4, "--output", output, "--threads", 1]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["ptq-onnx", "quantize", *map(str, [path, *words])])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: Node '")
    assert REFUSED[name] in lines[0]
    assert not output.exists()
