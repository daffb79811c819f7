"""``--device``: one line where CUDA does not work, the sessions that it reaches where it does."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort
import pytest
from jobs import tells_device

import ptq_onnx
from ptq_onnx.cli.app import main
from ptq_onnx.config.names import DEVICE_NAMES
from ptq_onnx.errors import ConfigError
from ptq_onnx.runtime import devices
from ptq_onnx.runtime.devices import AUTO, CPU_ONLY, CUDA_ONLY, chosen, on_device
from ptq_onnx.runtime.processes import Processes
from ptq_onnx.runtime.sessions import Session
from ptq_onnx.sweep import running
from ptq_onnx.sweep.matrix_file import read_sweep

DIGITS = Path(__file__).resolve().parents[2] / "img/digits"
QUICK: dict[str, Any] = {"threads": 1, "images": 8, "report": False, "analysis_images": 4}
STATISTICS, MEASURED = "tapped_runs.py", "network.py"
OF_THE_CPU = ("parity.py", "node_sessions.py", "segments.py", "matching.py", "optimised.py")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_works", lambda: False)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """As if CUDA worked: which file opened sessions on which device."""
    found: set[tuple[str, str]] = set()
    begin = Session.__init__

    def stub(session: Session, model: Any, options: Any, *, providers: Any) -> None:
        names = [p if isinstance(p, str) else p[0] for p in providers]
        frames = [Path(f.filename).name for f in traceback.extract_stack()]
        kinds = (*OF_THE_CPU, STATISTICS, MEASURED)
        kind = next((name for name in kinds if name in frames), "")
        found.add((kind, names[0].removesuffix("ExecutionProvider")))
        begin(session, model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(Session, "__init__", stub)
    monkeypatch.setattr(devices, "cuda_works", lambda: True)
    return found


@pytest.mark.parametrize("device", DEVICE_NAMES)
def test_the_sessions_that_it_reaches(
    short: Path, tmp_path: Path, opened: set[tuple[str, str]], device: str
) -> None:
    """Float statistics with cuda alone, measurements wherever a GPU works and is not refused; the
    check of the rewritten model and the simulation never."""
    ptq_onnx.quantize(
        short, calib=DIGITS / "calib", output=tmp_path / "out", device=device, **QUICK
    )
    assert {d for file, d in opened if file == STATISTICS} == {
        "CUDA" if device == CUDA_ONLY else "CPU"
    }
    measured = {"CPU" if device == CPU_ONLY else "CUDA"}
    assert {d for file, d in opened if file == MEASURED} == measured
    assert {d for file, d in opened if file not in (STATISTICS, MEASURED)} <= {"CPU"}
    opened.clear()
    ptq_onnx.evaluate(tmp_path / "out/quantized.onnx", DIGITS / "val", device=device, threads=1)
    assert opened == {(MEASURED, *measured)}
    assert chosen() == AUTO


def test_processes_run_where_their_parent_does(opened: set[tuple[str, str]]) -> None:
    for device in DEVICE_NAMES:
        with on_device(device), Processes(1, tells_device) as processes:
            assert list(processes.map([0])) == [device]


@pytest.mark.usefixtures("without")
def test_one_line_where_there_is_none(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--device", "cuda", "--threads", "1"]
    for words in (
        ["quantize", str(short), "--calib", str(DIGITS / "calib"), "-o", str(tmp_path / "no")],
        ["evaluate", str(short), "--val", str(DIGITS / "val")],
    ):
        monkeypatch.setattr(sys, "argv", ["ptq-onnx", *words, *common])
        with pytest.raises(SystemExit) as end:
            main()
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2
        assert len(lines) == 1
        assert lines[0].startswith("error: --device cuda: ")
        assert lines[0].endswith("; leave it out to run on the CPU.")
    assert not (tmp_path / "no").exists()
    with pytest.raises(ConfigError, match=r"device.*auto, cpu, cuda"):
        ptq_onnx.QuantizeConfig(device="gpu")


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(
    ("providers", "count", "words"),
    [
        (["CPUExecutionProvider"], 1, "install onnxruntime-gpu in its place"),
        (["CUDAExecutionProvider"], 0, "driver sees no GPU here"),
        (["CUDAExecutionProvider"], 1, "provider does not load"),
    ],
)
def test_the_reason(
    monkeypatch: pytest.MonkeyPatch, providers: list[str], count: int, words: str
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)
    monkeypatch.setattr(devices, "cuda_devices", lambda: count)
    with pytest.raises(ConfigError, match=words), on_device(CUDA_ONLY):
        pass


def test_parts_of_a_gpu_in_a_sweep(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"models: ['{short}']\ncalib: {DIGITS / 'calib'}\n"
    for gpus, wanted in ((None, 0), (0.25, 0.25), (2, 2)):
        more = "" if gpus is None else f"gpus: {gpus}\n"
        (tmp_path / "s.yaml").write_text(text + more)
        assert read_sweep(tmp_path / "s.yaml").gpus == wanted
    for wrong in ("1.5", "-1", "true", "many"):
        (tmp_path / "s.yaml").write_text(f"{text}gpus: {wrong}\n")
        with pytest.raises(ConfigError, match="gpus: expected a part of a GPU"):
            read_sweep(tmp_path / "s.yaml")
    monkeypatch.setattr(devices, "cuda_devices", lambda: 0)
    assert running._gpus_here(0) == 0
    with pytest.raises(ConfigError, match=r"gpus: 0.5 for each cell, but NVIDIA's driver sees 0"):
        running._gpus_here(0.5)
    nodes = [{"Alive": True, "Resources": {"CPU": 4, "memory": 9, "GPU": 1}}]
    ray = SimpleNamespace(nodes=lambda: nodes)
    assert running._largest_node(ray, 4, 0.5) == 9
    with pytest.raises(ConfigError, match="has 4 cores and 2 GPUs: lower threads or gpus"):
        running._largest_node(ray, 4, 2)
