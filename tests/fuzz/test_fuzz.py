"""A few hundred seeded cases of every kind, and what hypothesis makes up. The rest: make fuzz."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.cases import KINDS, damaged_model, run_case
from fuzz.oracle import judge
from ptq_onnx.cli.given import settings as options_of
from ptq_onnx.errors import ConfigError, ImageError
from ptq_onnx.images.labels import read_labels
from ptq_onnx.numerics.scales_file import read_scales

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {
    "model-bytes": 30,
    "model-fields": 30,
    "model-graph": 30,
    "image": 80,
    "npy": 60,
    "npz": 60,
    "labels": 60,
    "yaml": 100,
    "processor": 60,
    "scales": 15,
}
"""Cases of each kind; their seeds count from 0."""

seeded = settings(max_examples=100, derandomize=True, suppress_health_check=list(HealthCheck))
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def test_kinds() -> None:
    assert COUNTS.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", COUNTS)
def test_seeded(kind: str, tmp_path: Path) -> None:
    findings, codes = [], set()
    for seed in range(COUNTS[kind]):
        folder = tmp_path / str(seed)
        folder.mkdir()
        found = run_case(kind, seed, folder)
        codes.add(found.code)
        if found.finding or found.admits:
            findings.append(f"{kind} {seed}: {found.finding or found.text}")
    assert not findings, "\n".join(findings)
    assert codes == {0, 2}, "the damage is too small, or too large, to tell anything"


@seeded
@given(st.dictionaries(st.sampled_from(("size", "bits", "images", "mean", "a")), TREES))
def test_options(tree: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.yaml")
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        found = judge(lambda: options_of(str(path), {}), Path(folder))
    assert not found.finding
    assert found.code == 0 or len(found.text) < 800


@seeded
@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_labels(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "labels.txt")
        path.write_text(text, encoding="utf-8", newline="")
        labels = {}
        with suppress(ImageError):
            labels = read_labels(path)
    assert all(0 <= label < 10**9 for label in labels.values())


@seeded
@given(st.lists(TREES, max_size=2) | st.dictionaries(st.just("tensors"), st.lists(TREES)))
def test_scales(tree: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        path.write_text(json.dumps(tree, default=str), encoding="utf-8")
        with suppress(ConfigError):
            assert read_scales(path) == {}


@pytest.mark.parametrize("level", ["bytes", "fields", "graph"])
def test_as_a_command(level: str, tmp_path: Path) -> None:
    """The same in a process of its own: what C++ writes at its end is seen here too."""
    import random

    (tmp_path / "model.onnx").write_bytes(damaged_model(random.Random(f"a {level}"), level))
    words = ("quantize", "model.onnx", "--calib", "noise", "--images", "2", "--no-report")
    done = subprocess.run(
        [sys.executable, "-m", "ptq_onnx", *words, "--threads", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, 2)
    assert len(done.stderr.splitlines()) == (1 if done.returncode else 0), done.stderr
    left = {p.name for p in tmp_path.iterdir()} - {"model.onnx"}
    assert left == (set() if done.returncode else {"output"})
