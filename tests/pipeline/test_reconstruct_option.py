"""``--reconstruct`` in a whole run: what the report says, and a run that is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prepared_models import ROOT
from recorded_progress import Recorded

from ptq_onnx.config import stages
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.pipeline.quantize import quantize
from ptq_onnx.quantizers import finished_blocks, reconstruction

CALIBRATION = ROOT / "img/digits/calib"


def run(model: Path, output: Path, told: Recorded | None = None) -> dict[str, Any]:
    config = QuantizeConfig(
        quantizer="lowbit", bits="4/4/4", reconstruct=True, report=False, images=16, batch=4,
        threads=1, check_preprocess=False,
    )  # fmt: skip
    return quantize(model, config=config, output=output, calib=CALIBRATION, progress=told).report


def test_a_stopped_run_is_taken_up_by_the_next(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the same folder, with the same file; then nothing of it is left."""
    monkeypatch.setattr(reconstruction, "STEPS", {"cpu": 4})
    monkeypatch.setattr(reconstruction, "IMAGES", 4)
    output, left = tmp_path / "out", tmp_path / ".out.unfinished"
    write = finished_blocks.FinishedBlocks.keep

    def stopped(self: Any, key: str, learning: Any) -> None:
        write(self, key, learning)
        raise KeyboardInterrupt

    monkeypatch.setattr(finished_blocks.FinishedBlocks, "keep", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(short, output)
    assert [p.name for p in tmp_path.iterdir()] == [left.name]
    monkeypatch.setattr(finished_blocks.FinishedBlocks, "keep", write)
    told = Recorded()
    report = run(short, output, told)
    told.assert_complete()
    assert stages.RECONSTRUCTING in told.names
    assert stages.ROUNDING not in told.names
    (block,) = report["trained"]
    assert (block["block"], block["steps"], block["resumed"]) == ("blocks.0", 4, True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    whole = run(short, tmp_path / "whole")
    (again,) = whole["trained"]
    assert {**again, "resumed": True} == block
    names = "out/quantized.onnx", "whole/quantized.onnx"
    one, other = ((tmp_path / name).read_bytes() for name in names)
    assert one == other
