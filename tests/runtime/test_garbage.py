"""Python looks for garbage seldom in processes that are ours, and as it did in those of others."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest
from jobs import tells_thresholds

from ptq_onnx.cli import app
from ptq_onnx.runtime.garbage import SELDOM
from ptq_onnx.runtime.processes import Processes

CHOSEN = 500, 9, 8


@pytest.fixture(autouse=True)
def chosen() -> Iterator[None]:
    """What a user's program has."""
    before = gc.get_threshold()
    gc.set_threshold(*CHOSEN)
    yield
    gc.set_threshold(*before)


def test_in_processes_of_ours() -> None:
    with Processes(1, tells_thresholds) as one:
        assert [*one.map([0])] == [SELDOM]
    assert gc.get_threshold() == CHOSEN


def test_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ptq-onnx", "--version"])
    with pytest.raises(SystemExit):
        app.main()
    assert gc.get_threshold() == SELDOM
