"""example.py and the public names of the package."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ptq_onnx

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "example.py"
PYTHON = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_arguments(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("lower is better", "softmax", "top-1 of 450 images", "output/report.html"):
        assert word in done.stdout
    assert "No --calib" not in done.stdout
    output = tmp_path / "output"
    names = {path.name for path in output.iterdir()}
    assert names == {
        ".ptq_onnx.json", "attention", "config.yaml", "formed.onnx", "fused.onnx", "quantized.onnx",
        "report.html", "report.json",
    }  # fmt: skip
    assert list((output / "attention").glob("*.png"))
    report = json.loads((output / "report.json").read_text())
    assert report["accuracy"]["quantized"]["top1"] > report["accuracy"]["float"]["top1"] - 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "vit_base_patch16_224"), "ptq-onnx export vit_base_patch16_224"),
        (("--bits", "0/99/x"), "--bits 0/99/x"),
        (("--quantizer", "nix"), "vanilla, channelwise, fqvit"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    words: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process: in one of its own most of the time goes into imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    out, errors = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert said in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_input_ends_the_process(tmp_path: Path) -> None:
    done = run(tmp_path, "--model", "nope.onnx")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nope.onnx does not exist" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_short_and_public_only() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    imports = [line for line in text.splitlines() if "ptq_onnx" in line and "import" in line]
    assert len(imports) == 1
    assert imports[0].startswith("from ptq_onnx import ")
    names = imports[0].partition("import ")[2].split(", ")
    assert set(names) <= set(ptq_onnx.__all__)


def test_public_names() -> None:
    assert set(ptq_onnx.__all__) == set(ptq_onnx._HOMES)
    for name, home in ptq_onnx._HOMES.items():
        found = getattr(importlib.import_module(f"ptq_onnx.{home}"), name)
        assert getattr(ptq_onnx, name) is found
        assert name in dir(ptq_onnx)
    with pytest.raises(AttributeError, match="no attribute 'nix'"):
        _ = ptq_onnx.nix  # type: ignore[attr-defined]


def test_snippet_of_the_pages(tmp_path: Path) -> None:
    """The Python in docs/python.md runs as it stands, from the project's folder."""
    snippet = PYTHON.partition("```python\n")[2].partition("```")[0]
    for name in ("models/digits_vit.onnx", "img/digits"):
        source, place = ROOT / name, tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, place) if source.is_dir() else shutil.copy(source, place)
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Result(vit8.onnx: size 1.28 → 0.52 MB, top-1 98.0 → ")
    assert "agreement" in done.stdout
