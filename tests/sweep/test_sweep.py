"""The command: a matrix run by Ray gives what each quantization gives by itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ptq_onnx.cli import app as cli
from ptq_onnx.sweep.matrix import Cell, cells_of
from ptq_onnx.sweep.matrix_file import read_sweep
from ptq_onnx.sweep.work import BETWEEN, run_cell

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "img" / "digits"
TEXT = f"""
models: [short.onnx, broken.onnx]
recipes: [channelwise, fqvit]
targets: [onnxruntime, tensorrt]
calib: {DIGITS / "calib"}
val: val
seeds: [3]
options: {{images: 8, analysis_images: 8, report: false}}
exclude: {{model: broken, recipe: fqvit}}
"""


@pytest.fixture
def base(tmp_path: Path, short: Path) -> Path:
    shutil.copy(short, tmp_path / "short.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    (tmp_path / "val").mkdir()
    for picture in sorted((DIGITS / "val").iterdir())[:12]:
        shutil.copy(picture, tmp_path / "val")
    (tmp_path / "s.yaml").write_text(TEXT)
    return tmp_path


def command(base: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "ptq_onnx", "sweep", "s.yaml", *words],
        cwd=base,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def fidelity(folder: Path, cells: Sequence[Cell]) -> dict[str, object]:
    files = ((cell.name, folder / cell.name / "report.json") for cell in cells)
    return {n: json.loads(file.read_text())["fidelity"] for n, file in files if file.is_file()}


def quantized(folder: Path, cells: Sequence[Cell]) -> dict[str, bytes]:
    files = ((cell.name, folder / cell.name / "quantized.onnx") for cell in cells)
    return {name: file.read_bytes() for name, file in files if file.is_file()}


def test_a_sweep_and_the_same_again(base: Path) -> None:
    pytest.importorskip("ray", reason="a sweep runs on Ray: the extra [ray]")
    done = command(base, "-o", "out", "--workers", "2")
    assert done.stderr == ""
    assert done.returncode == 1  # for the broken model alone
    told = " ".join(done.stdout.split())
    assert "6 cells: 2 done, 1 failed, 3 refused." in told
    assert "failed: broken/channelwise_onnxruntime_8-8-8_calib_3: Model" in told
    cells = cells_of(read_sweep(base / "s.yaml"))
    runnable = [cell for cell in cells if cell.config is not None]
    for cell in runnable[::-1]:  # in another order, by one process
        run_cell(cell, base / "alone", "")
    assert quantized(base / "out", cells) == quantized(base / "alone", cells)
    assert len(quantized(base / "out", cells)) == 2
    assert fidelity(base / "out", cells) == fidelity(base / "alone", cells)
    assert len(list((base / "alone" / BETWEEN).rglob("*.npy"))) == 1  # both cells' float model
    assert not (base / "out" / BETWEEN).exists()
    before = {p: p.stat().st_mtime_ns for p in (base / "out").rglob("quantized.onnx")}
    again = command(base, "-o", "out", "--workers", "1")
    assert (again.returncode, again.stderr) == (1, "")
    assert "2 done, 1 failed, 3 refused (2 of them before)." in " ".join(again.stdout.split())
    assert {p: p.stat().st_mtime_ns for p in (base / "out").rglob("quantized.onnx")} == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--workers", "0"), "--workers must be at least 1, got 0."),
        (("--workers", "1", "--address", "x:1"), "--workers is for this machine"),
        (("-o", "x.onnx"), "no model is written here; name a folder."),
    ],
)
def test_wrong_options(
    base: Path,
    words: tuple[str, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(base)
    monkeypatch.setattr(sys, "argv", ["ptq-onnx", "sweep", "s.yaml", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert told in capsys.readouterr().err
    assert not (base / "sweep").exists()


def test_ray_is_imported_by_nothing_else() -> None:
    code = "import sys, ptq_onnx.cli.app, ptq_onnx.sweep.running; print('ray' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
