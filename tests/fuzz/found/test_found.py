"""Nothing that was found comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fuzz.cases import run_model
from fuzz.found.cases import CASES, Case
from fuzz.oracle import judge


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_found(case: Callable[[Path], Case], tmp_path: Path) -> None:
    words, code = case(tmp_path)
    found = judge(lambda: run_model(tmp_path, words), tmp_path)
    assert found.finding == ""
    assert found.code == code, found.text
    assert not found.admits, found.text
    assert len(found.text) < 700
