"""A wrong normalisation: told before calibration, above a verdict that is not green."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prepared_models import DIGITS, ROOT
from rich.console import Console

from ptq_onnx.calibration.preprocess_check import Confidence, PreprocessCheck
from ptq_onnx.cli.console import progress_bars, show
from ptq_onnx.config import stages
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.pipeline import deciding
from ptq_onnx.pipeline.quantize import Result, quantize
from ptq_onnx.progress import WHOLE
from ptq_onnx.report.page import render, verdict

TEXT = "The preprocessing looks wrong: give --preprocess inception."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the digits, in a folder that is not the embedded one."""
    folder = tmp_path_factory.mktemp("digits")
    for path in sorted((ROOT / "img/digits/calib").iterdir())[:12]:
        Image.open(path).save(folder / path.name)
    return folder


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The check finds that the normalisation is wrong; what happened, in order."""
    happened: list[str] = []

    def check(*_: Any) -> PreprocessCheck:
        happened.append("checked")
        return PreprocessCheck(Confidence("yours", (0.5,), (0.5,), 0.1, 8), (), TEXT)

    monkeypatch.setattr(deciding, "check_preprocess", check)
    return happened


def run(folder: Path, out: Path, happened: list[str] | None = None, **options: Any) -> Result:
    def progress(stage: str, total: int) -> Callable[[int], None]:
        if happened is not None:
            happened.append(stage)
        return lambda _: None

    config = QuantizeConfig(images=8, threads=1, report=False, **options)
    return quantize(DIGITS, config=config, calib=folder, output=out, progress=progress)


def test_the_check_comes_first_and_its_warning_above_the_verdict(
    folder: Path, tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(folder, tmp_path / "out", wrong, quantizer="channelwise", per_channel=("auto",))
    assert wrong.count("checked") == 1
    before = wrong[: wrong.index("checked")]
    assert before == [WHOLE, stages.READING, stages.LOADING, stages.CHECKING]
    assert stages.CHANNELS in wrong
    page = render(found.report, "", [])
    assert page.index('id="warning"') < page.index('id="verdict"')
    assert TEXT in page
    show(found)
    shown = capsys.readouterr().out
    assert shown.index(f"warning: {TEXT}") < shown.index("SQNR of the logits")
    assert f"note: {TEXT}" not in shown
    assert TEXT in found.report["notes"]


@pytest.mark.parametrize(
    ("before", "after", "grade", "amber"),
    [(80.0, 79.8, "good", "fair"), (80.0, 78.0, "fair", "fair"), (80.0, 70.0, "bad", "bad")],
)
def test_nothing_is_green_beside_a_warning(
    before: float, after: float, grade: str, amber: str
) -> None:
    report: dict[str, Any] = {
        "accuracy": {"count": 500, "float": {"top1": before}, "quantized": {"top1": after}}
    }
    assert verdict(report)[0] == grade
    report["preprocess_check"] = {"warning": None}
    assert verdict(report)[0] == grade
    report["preprocess_check"] = {"warning": TEXT}
    assert verdict(report)[0] == amber
    assert "see the warning" in verdict(report)[1]
    assert "The accuracy holds" not in verdict(report)[1]
    assert 'id="warning"' in render(report, "", [])
    report["preprocess_check"] = None
    assert 'id="warning"' not in render(report, "", [])


def test_it_is_told_at_once(
    folder: Path, tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bars() as progress:
        assert progress is None
        run(folder, tmp_path / "out")
        assert capsys.readouterr().err == f"warning: {TEXT}\n"
    run(folder, tmp_path / "again")
    Console().print()
    assert TEXT not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--preprocess", "nix"), 2),
        (("--preprocess", "imagenet", "--no-check-preprocess"), 2),
        (("--mean", "0.5", "--std", "0.5,x"), 2),
    ],
)
def test_example_takes_what_the_message_recommends(
    words: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    """Until the model, which is not there, is asked for."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "example.py"), "--model", "nix.onnx", "--calib", "x", *words],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert "unrecognized" not in done.stderr
    wanted = {"nix": "imagenet", "0.5": "--std"}.get(words[1], "nix.onnx does not exist")
    assert wanted in done.stderr
