"""The commands of the page: they run, and give what the run gave."""

from __future__ import annotations

import json
import re
import shlex
import sys
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from prepared_models import DIGITS, ROOT
from sample_report import make_report
from short_digits import short_digits

from ptq_onnx import quantize as quantize_in_python
from ptq_onnx.cli import app as cli
from ptq_onnx.images.opening import open_images
from ptq_onnx.pipeline.quantize import resolve_preprocess
from ptq_onnx.report.reproduce import command, following, in_python, named, typed
from ptq_onnx.report.suggestions import NOTHING, suggestions

CALIB = ROOT / "img/digits/calib"


def run(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> int:
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def tensors(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())["tensors"]


def test_the_command_of_the_page_repeats_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typed where the run was started: names with blanks, paths below and outside the folder."""
    monkeypatch.chdir(tmp_path)
    Path("my models").mkdir()
    short_digits(Path("my models/the vit.onnx"))
    words = ["ptq-onnx", "quantize", "my models/the vit.onnx", "--calib", str(CALIB), "--images",
             "4", "--quantizer", "vanilla", "--keep-float", "fc2@0", "--analysis-images", "1",
             "--no-pictures", "--threads", "1", "--output", str(tmp_path / "out 1")]  # fmt: skip
    assert run(monkeypatch, words) == 0
    page = Path("out 1/report.html").read_text(encoding="utf-8")
    shown = re.search(r'<pre id="command">(.*?)</pre>', page, re.DOTALL)
    assert shown is not None
    again = shlex.split(unescape(shown[1]))
    assert again == [
        "ptq-onnx", "quantize", "my models/the vit.onnx", "--config", "out 1/config.yaml",
        "--calib", str(CALIB), "--output", "out 1-again",
    ]  # fmt: skip
    assert run(monkeypatch, again) == 0
    assert tensors(Path("out 1-again")) == tensors(Path("out 1"))
    one, other = (Path(f, "quantized.onnx").read_bytes() for f in ("out 1", "out 1-again"))
    assert one == other
    # what is to be done next runs too
    checks = [line for line in re.findall(r"<pre>(.*?)</pre>", page) if " check " in line]
    assert run(monkeypatch, shlex.split(unescape(checks[0]))) in (0, 1)
    capsys.readouterr()


def test_what_has_no_path_is_named_as_missing(tmp_path: Path) -> None:
    """A protobuf and arrays: the command says where a folder belongs, and names no temporary."""
    preprocess = resolve_preprocess(DIGITS, _config())
    images = np.concatenate(list(open_images(CALIB, preprocess, limit=4).batches(4)))
    found = quantize_in_python(
        onnx.load(DIGITS), calib=images, output=tmp_path / "out", config=_config()
    )
    assert in_python(found.report)
    words = command(found.report)
    assert words[:3] == ["ptq-onnx", "quantize", "model.onnx"]
    assert words[words.index("--calib") + 1] == "calib"
    same = quantize_in_python(
        DIGITS, calib=open_images(CALIB, preprocess, limit=4), output=tmp_path / "out",
        config=_config(),
    )  # fmt: skip
    assert not in_python(same.report)
    assert Path(command(same.report)[6]).resolve() == CALIB.resolve()


def _config() -> Any:
    from ptq_onnx.config.quantize_config import QuantizeConfig

    return QuantizeConfig(quantizer="vanilla", images=4, report=False, threads=1)


def test_paths_are_named_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named(tmp_path / "a" / "b.onnx") == "a/b.onnx"
    assert named("../b.onnx") == "../b.onnx"
    assert named("noise") == "noise"
    assert named(tmp_path) == str(tmp_path)
    assert named(np.zeros(3)) is None
    assert named("bad\udcff.onnx") == "bad?.onnx"


INVOCATION = {
    "command": "quantize", "model": "vit.onnx", "calib": "pics", "val": None, "labels": None,
    "scales": None, "folder": "out", "written": "out/quantized.onnx",
}  # fmt: skip


def test_suggestions_follow_the_verdict() -> None:
    report = make_report(1) | {"invocation": INVOCATION}
    report["config"]["quantizer"] = "vanilla"
    report["analysis"]["variation"] = {"tensors": []}
    report["analysis"]["sensitivity"] = None
    good = suggestions(report, "good")
    assert (NOTHING, "") in good
    lines = [line for _, line in good if line]
    assert not any("--auto" in line or "--quantizer" in line for line in lines)
    assert lines[0].startswith("ptq-onnx analyse vit.onnx --config out/config.yaml --calib pics")
    assert lines[-1] == "ptq-onnx benchmark out/fused.onnx out/quantized.onnx"
    bad = suggestions(report, "bad")
    again = "ptq-onnx quantize vit.onnx --config out/config.yaml --calib pics"
    assert f"{again} --quantizer deploy --output out-again" in [line for _, line in bad]
    assert f"{again} --auto --output out-again" in [line for _, line in bad]
    assert bad[0][0].endswith("the worst op is fc2, 15.0 dB.") or "adds up" in bad[0][0]
    report["analysis"]["advice"] = ["Do this."]
    assert suggestions(report, "bad")[0] == ("Do this.", "")
    assert suggestions({"blocks": 0}, "none") == []


def test_nothing_comes_next_without_a_model() -> None:
    report = make_report(1) | {"invocation": {**INVOCATION, "written": None}}
    assert following(report) == {}
    old = make_report(1)
    assert typed(command(old)).startswith("ptq-onnx quantize vit_tiny.onnx --config config.yaml")
