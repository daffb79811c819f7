"""A cell in its folder: whole or not at all, taken up or run again, and what a failure leaves."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError
from ptq_onnx.files.held_folder import locked, unlock
from ptq_onnx.sweep import need
from ptq_onnx.sweep.cell import DONE, FAILED, NOTICE, RECORD, finished
from ptq_onnx.sweep.fingerprint import fingerprint, forget
from ptq_onnx.sweep.matrix import AXES, Cell
from ptq_onnx.sweep.running import Machines, _clear, run
from ptq_onnx.sweep.work import run_cell

DIGITS = Path(__file__).resolve().parents[2] / "img" / "digits"
OPTIONS: dict[str, Any] = {"images": 8, "analysis_images": 8, "report": False, "threads": 1}


@pytest.fixture
def cell(short: Path) -> Cell:
    config = QuantizeConfig(quantizer="channelwise", **OPTIONS)
    return Cell(dict.fromkeys(AXES, "x"), short, str(DIGITS / "calib"), None, None, config)


def test_a_cell_is_the_usual_result_and_its_record(cell: Cell, tmp_path: Path) -> None:
    row = run_cell(cell, tmp_path, "mark")
    place = tmp_path / "x/x_x_x_x_x"
    assert (row.status, row.reason, row.page, row.attempts) == (DONE, None, False, 1)
    assert {p.name for p in place.iterdir()} >= {"quantized.onnx", "report.json", RECORD}
    report = json.loads((place / "report.json").read_text())
    assert row.sqnr_db == report["fidelity"]["sqnr_db"]
    assert row.quantized_bytes == (place / "quantized.onnx").stat().st_size
    assert (row.top1, row.images) == (None, 8)
    assert row.peak_bytes is None or row.peak_bytes > 1 << 27
    assert finished(cell, tmp_path, "mark") == row
    assert finished(cell, tmp_path, "other") is None
    (place / RECORD).write_text("{}")
    assert finished(cell, tmp_path, "mark") is None


def test_a_failure_leaves_only_its_reason(cell: Cell, tmp_path: Path) -> None:
    place = tmp_path / "x/x_x_x_x_x"
    run_cell(cell, tmp_path, "mark")
    broken = replace(cell, model=tmp_path / "broken.onnx")
    broken.model.write_bytes(b"no model")
    row = run_cell(broken, tmp_path, "mark", attempt=2)
    assert (row.status, row.attempts, row.sqnr_db) == (FAILED, 2, None)
    assert row.reason is not None
    assert "broken.onnx" in row.reason
    assert "\n" not in row.reason
    assert {p.name for p in place.iterdir()} == {RECORD, ".ptq_onnx.json"}
    assert finished(broken, tmp_path, "mark") is None


def test_a_fault_of_ours_is_one_line_with_its_kind(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("ptq_onnx.sweep.work.quantize_apart", fails)
    row = run_cell(cell, tmp_path, "mark")
    assert row.reason == "ZeroDivisionError: division by zero."


def test_no_record_of_old_numbers_beside_new_ones(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the results and their record, a cell is not done, whatever it was before."""
    run_cell(cell, tmp_path, "old")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ptq_onnx.sweep.cell.write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, tmp_path, "new")
    assert finished(cell, tmp_path, "old") is None
    assert (tmp_path / "x/x_x_x_x_x/quantized.onnx").is_file()


def test_a_node_that_sees_another_folder_writes_nothing(cell: Cell, tmp_path: Path) -> None:
    row = run_cell(cell, tmp_path, "mark", notice="a")
    assert row.reason is not None
    assert "does not see" in row.reason
    assert list(tmp_path.iterdir()) == []
    (tmp_path / NOTICE).write_text("a")
    assert run_cell(cell, tmp_path, "mark", notice="a").status == DONE


def changed(cell: Cell, tmp_path: Path, what: str) -> Cell:
    """The cell with one thing that its numbers depend on changed."""
    assert cell.config is not None
    if what == "option":
        return replace(cell, config=replace(cell.config, images=9))
    if what == "model":
        model = onnx.load(cell.model)
        model.doc_string = "another"
        onnx.save(model, tmp_path / "m.onnx")
        return replace(cell, model=tmp_path / "m.onnx")
    (tmp_path / "val").mkdir()
    (tmp_path / "val/1.png").write_bytes(b"1")
    return replace(cell, val=str(tmp_path / "val"))


@pytest.mark.parametrize("what", ["option", "model", "images"])
def test_what_a_cell_depends_on(cell: Cell, tmp_path: Path, what: str) -> None:
    forget()
    assert fingerprint(cell) == fingerprint(replace(cell))
    other = changed(cell, tmp_path, what)
    assert fingerprint(other) != fingerprint(cell)
    if what == "images":
        before = fingerprint(other)
        (tmp_path / "val/1.png").write_bytes(b"12")
        forget()
        assert fingerprint(other) != before


def test_memory_by_size(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured on ViT-B/16: 2.04 GB at most, 4.20 GB with a report."""
    monkeypatch.setattr(need, "model_bytes", lambda _: 346_214_755)
    assert cell.config is not None
    plain = need.memory_of(cell)
    whole = need.memory_of(replace(cell, config=replace(cell.config, report=True)))
    assert 2.04e9 < plain < 1.25 * 2.04e9
    assert 4.20e9 < whole < 1.25 * 4.20e9


@pytest.mark.parametrize(
    ("cores", "memory", "wide", "large", "count"),
    [(2, 20, 1, 3, 2), (16, 20, 1, 3, 6), (16, 20, 4, 3, 4), (2, 20, 1, 30, 1), (2, 20, 4, 3, 1)],
)
def test_how_many_at_a_time(cores: int, memory: int, wide: int, large: int, count: int) -> None:
    assert need.fitting(cores, memory, wide, large) == count


def silent(_todo: int, _all: int) -> Callable[[Any], None]:
    return lambda row: None


def test_what_is_done_needs_no_ray(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = replace(cell, axes={**cell.axes, "seed": "1"}, config=None, refusal="because.")
    row = run_cell(cell, tmp_path, fingerprint(cell))
    monkeypatch.setattr("ptq_onnx.sweep.running.started", None)
    found = run([cell, refused], tmp_path, Machines(1), 0, silent)
    assert found.rows[0] == row
    assert (found.rows[1].status, found.rows[1].reason) == ("refused", "because.")
    assert found.before == 1


def test_one_sweep_at_a_time(cell: Cell, tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="there are no such locks")
    run_cell(cell, tmp_path, fingerprint(cell))

    def second(_todo: int, _all: int) -> Callable[[Any], None]:
        with pytest.raises(ConfigError, match="Another sweep runs into"):
            run([cell], tmp_path, Machines(1), 0, silent)
        return lambda row: None

    run([cell], tmp_path, Machines(1), 0, second)
    assert not (tmp_path / ".lock").exists()


def test_leftovers_are_waited_for(cell: Cell, tmp_path: Path) -> None:
    """A killed process holds its files until its last thread is gone."""
    pytest.importorskip("fcntl", reason="there are no such locks")
    place = tmp_path / cell.name
    left = place.with_name(f".{place.name}.ptq-00000000")
    left.mkdir(parents=True)
    (left / "half").touch()
    lock = locked(left)
    assert lock is not None
    timer = threading.Timer(0.2, unlock, [lock])
    timer.start()
    _clear([cell], tmp_path)
    assert list(tmp_path.iterdir()) == []
    timer.join()


def test_without_ray_one_line_says_how_to_get_it(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'ray==2\.60\.\*'.*\[ray\]"):
        run([cell], tmp_path, Machines(1), 0, silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["nix", "127.0.0.1:1", "10.0.0.1"])
def test_an_address_without_a_cluster(cell: Cell, tmp_path: Path, address: str) -> None:
    pytest.importorskip("ray", reason="a sweep runs on Ray: the extra [ray]")
    with pytest.raises(ConfigError, match=f"--address {address}: "):
        run([cell], tmp_path, Machines(address=address), 0, silent)
