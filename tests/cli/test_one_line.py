"""Every command tells in one line what it cannot take; no traceback, no dump of the graph."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from PIL import Image
from small_graph import SmallGraph, sample

from ptq_onnx.cli import app as cli

WORDS = {
    "quantize": ["quantize", "MODEL", "--calib", "noise", "--output", "OUT"],
    "analyse": ["analyse", "MODEL", "--calib", "noise", "--output", "OUT"],
    "calibration-curve": ["calibration-curve", "MODEL", "--calib", "VAL", "--val", "VAL",
                          "--sizes", "1", "--output", "OUT"],
}  # fmt: skip
"""Commands that prepare the model."""
RUNNERS = {
    "inspect": ["inspect", "MODEL"],
    "check": ["check", "MODEL"],
    "evaluate": ["evaluate", "MODEL", "--val", "VAL", "--reference", "MODEL"],
    "compare": ["compare", "MODEL", "--val", "VAL", "--reference", "MODEL"],
    "benchmark": ["benchmark", "MODEL", "MODEL", "--seconds", "0.01", "--batch", "1"],
}
"""Commands that only run it, or read it."""


@pytest.fixture(scope="module")
def undecided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A branch by the values of the image."""
    g = SmallGraph(("batch", 3, 8, 8))
    out = helper.make_tensor_value_info("y", 1, None)
    ways = [
        helper.make_graph([helper.make_node(op, ["x"], ["y"])], op, [], [out])
        for op in ("Relu", "Neg")
    ]
    y = g("If", g("Greater", g("ReduceMax", "x", keepdims=0), 0.5),
          then_branch=ways[0], else_branch=ways[1])  # fmt: skip
    g.output_shape = ("batch", 5)
    flat = g("Reshape", y, np.array([0, 192]))
    return g.save(tmp_path_factory.mktemp("m") / "m.onnx", g("MatMul", flat, sample(192, 5)))


def call(
    words: list[str], model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> int | str | None:
    images = folder / "val"
    images.mkdir()
    for i in range(2):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(images / f"{i}.png")
    names = {"MODEL": str(model), "VAL": str(images), "OUT": str(folder / "out")}
    monkeypatch.setattr(sys, "argv", ["ptq-onnx", *(names.get(w, w) for w in words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.mark.parametrize("command", WORDS)
def test_an_undecided_branch_is_one_line(
    command: str,
    undecided: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(WORDS[command], undecided, tmp_path, monkeypatch) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert (
        "If is control flow, and its condition depends on the values of the input 'x'" in lines[0]
    )


@pytest.mark.parametrize("command", RUNNERS)
def test_what_only_runs_it_works(
    command: str,
    undecided: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(RUNNERS[command], undecided, tmp_path, monkeypatch) in (0, None)
    out = " ".join(capsys.readouterr().out.split())
    assert "Traceback" not in out
    if command == "inspect":
        assert "not prepared: Node" in out
        assert "1 If" in out
