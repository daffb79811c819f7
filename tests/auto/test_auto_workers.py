"""``--auto`` and the sensitivity analysis on several processes decide and find the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ptq_onnx
from ptq_onnx.auto.trial_runs import TrialRuns
from ptq_onnx.errors import ModelError

DIGITS = Path(__file__).resolve().parents[2] / "img/digits"


@pytest.mark.usefixtures("always_shared")
def test_the_same_decisions_and_bytes(short: Path, tmp_path: Path) -> None:
    reports: list[Any] = []
    files = []
    for workers in (1, 2):
        found = ptq_onnx.quantize(
            short, calib=DIGITS / "calib", val=sorted((DIGITS / "val").glob("*.png"))[:20],
            output=tmp_path / str(workers), bits="8/6/8", auto=True, min_sqnr=20.3, images=8,
            analysis_images=4, report=False, threads=1, workers=workers, quantizer="channelwise",
            method="minmax",
        )  # fmt: skip
        del found.report["auto"]["seconds"], found.report["config"]["workers"]
        del found.report["invocation"]
        reports.append(found.report)
        files.append((found.output / "quantized.onnx").read_bytes())
    assert reports[0] == reports[1]
    assert files[0] == files[1]
    assert reports[0]["auto"]["met"]
    assert reports[0]["auto"]["trials"] > 1
    assert reports[0]["auto"]["decisions"]


def test_processes_open_the_file_that_they_are_given(short: Path, tmp_path: Path) -> None:
    """Another file after the first, and one that is none: an error as here."""
    x = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    batches = [(["a", "b"], x[:2]), (["c", "d"], x[2:])]
    other = Path(__file__).resolve().parents[2] / "models/digits_vit.onnx"
    with TrialRuns(1, 1) as here, TrialRuns(1, 2) as there:
        for path in (short, other, short):
            network = here.open(path, "The model")
            one = list(here.over(path, network, batches))
            two = list(there.over(path, network, batches))
            assert [names for names, _ in two] == [["a", "b"], ["c", "d"]]
            for (_, mine), (_, theirs) in zip(one, two, strict=True):
                assert mine.keys() == theirs.keys()
                assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
        with pytest.raises(ModelError, match="The model"):
            list(there.over(tmp_path / "none.onnx", network, batches))
