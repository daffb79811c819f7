"""Stages of cells in any order, and what of them is lost: the results are those of one process."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from small_image_model import image_model, pictures

from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.evaluation import parts as evaluation_parts
from ptq_onnx.evaluation.recorded import Record
from ptq_onnx.files.output_paths import Output
from ptq_onnx.images.preprocess import Preprocess
from ptq_onnx.pipeline.apart import Unfinished
from ptq_onnx.pipeline.request import Request
from ptq_onnx.sweep import need
from ptq_onnx.sweep.cell import DONE, FAILED, NOTHING, RECORD, Row, Spent
from ptq_onnx.sweep.matrix import AXES, Cell
from ptq_onnx.sweep.stages import (
    FINISH,
    FLOAT,
    MEASURE,
    PREPARE,
    WRITE,
    Measured,
    Schedule,
    Task,
    Written,
)
from ptq_onnx.sweep.work import BETWEEN, Place, do, run_cell

Fate = Callable[[Task], bool]
PLAIN = Preprocess((0.5,) * 3, (0.5,) * 3, (16, 16))
PARTS = ((0, 8), (8, 16), (16, 21))


def cell(name: str, model: Path = Path("m.onnx"), val: str | None = None) -> Cell:
    axes = dict.fromkeys(AXES, "x") | {"model": "m", "recipe": name}
    return Cell(axes, model, "calib", val, None, QuantizeConfig(threads=1))


def written(one: Cell, floats: str = "floats") -> Written:
    request = Request(one.model, QuantizeConfig(), Output.at(Path("out")))
    record = Record(Path(floats))
    return Written(Unfinished(request, Path(one.name), PLAIN, PARTS, record), Spent(1.0, 100, 2))


def drained(schedule: Schedule) -> list[Task]:
    return list(iter(schedule.next, None))


def told(tasks: list[Task]) -> list[tuple[int, str, int]]:
    return [(task.stage, task.cell.axes["recipe"], task.part[0]) for task in tasks]


def test_one_model_is_prepared_before_its_cells() -> None:
    a, b, c = cell("a"), cell("b"), cell("c", Path("other.onnx"))
    schedule = Schedule([c, a, b], lambda one: one.model)
    tasks = drained(schedule)
    assert told(tasks) == [(WRITE, "c", 0), (PREPARE, "a", 0)]
    assert schedule.took(tasks[1], Measured(True, NOTHING)) is None
    assert told(drained(schedule)) == [(WRITE, "a", 0), (WRITE, "b", 0)]
    alone = Schedule([a, b], lambda one: None)
    assert told(drained(alone)) == [(WRITE, "a", 0), (WRITE, "b", 0)]


def test_what_is_nearest_to_a_finished_cell_goes_first() -> None:
    a, b = cell("a"), cell("b")
    schedule = Schedule([a, b], lambda one: None)
    first, second = drained(schedule)
    schedule.took(second, written(b))
    parts = drained(schedule)
    assert told(parts) == [(s, "b", n) for s in (FLOAT, MEASURE) for n in (0, 8, 16)]
    schedule.took(first, written(a))  # its float model is run by the other's tasks
    own = drained(schedule)
    assert told(own) == [(MEASURE, "a", n) for n in (0, 8, 16)]
    for task in own:
        schedule.took(task, Measured(True, Spent(2.0, 70, 1)))
    for task in parts[3:]:
        schedule.took(task, Measured(task.part[0] != 8, Spent(3.0, 700, 1)))
    assert schedule.next() is None
    for task in parts[:3]:
        schedule.took(task, Measured(True, Spent(50.0, 9000, 9)))
    last = {task.cell.axes["recipe"]: task for task in drained(schedule)}
    assert {task.stage for task in last.values()} == {FINISH}
    assert (last["a"].whole, last["a"].spent) == (True, Spent(7.0, 100, 2))
    assert (last["b"].whole, last["b"].spent) == (False, Spent(10.0, 700, 2))
    row = Row.of(a, DONE)
    assert (schedule.took(last["a"], row), schedule.left, schedule.alone) == (row, 1, 0)
    schedule.took(last["b"], Row.of(b, DONE))
    assert (schedule.left, schedule.alone) == (0, 1)


def test_what_is_lost_ends_its_own_cell_alone() -> None:
    a, b = cell("a"), cell("b")
    schedule = Schedule([a, b], lambda one: one.model)
    (prepare,) = drained(schedule)
    assert schedule.lost(prepare, Row.of(a, FAILED)) is None
    begun = drained(schedule)
    assert told(begun) == [(WRITE, "a", 0), (WRITE, "b", 0)]
    for task in begun:
        schedule.took(task, written(task.cell))
    first = schedule.next()
    assert first is not None
    assert schedule.lost(first, Row.of(a, FAILED)) is None  # the float model's: all do without
    parts = {(t.stage, t.cell.axes["recipe"], t.part[0]): t for t in drained(schedule)}
    row = Row.of(a, FAILED)
    assert schedule.lost(parts[MEASURE, "a", 0], row) is row
    assert schedule.lost(parts[MEASURE, "a", 8], row) is None  # told once
    assert schedule.left == 1
    for task in parts.values():
        if task.stage == FLOAT or task.part[0] == 16 or task.cell == b:
            assert schedule.took(task, Measured(True, NOTHING)) is None
    (last,) = drained(schedule)
    assert (last.stage, last.cell, last.whole) == (FINISH, b, False)


def test_no_tasks_of_a_lost_cell_are_begun() -> None:
    a = cell("a")
    schedule = Schedule([a], lambda one: None)
    (begun,) = drained(schedule)
    schedule.took(begun, written(a))
    assert (schedule.next(), schedule.next(), schedule.next()) != (None,) * 3
    task = schedule.next()
    assert task is not None
    schedule.lost(task, Row.of(a, FAILED))
    assert schedule.next() is None


def in_turns(cells: list[Cell], place: Place, seed: int, fate: Fate) -> list[Row]:
    """Rows of a sweep without Ray, its tasks taken in an order by chance; ``fate``: whether the
    process of a task ends by itself, not killed."""
    schedule, rows, chance = Schedule(cells, need.prepared_alike), [], random.Random(seed)
    ready: list[Task] = []
    while True:
        ready += drained(schedule)
        if not ready:
            return rows
        task = ready.pop(chance.randrange(len(ready)))
        if fate(task):
            row = schedule.took(task, do(task, place, "mark", 1))
        else:
            row = schedule.lost(task, Row.of(task.cell, FAILED))
        if row is not None:
            rows.append(row)


def content(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*.*") if p.is_file() and p.name not in (RECORD, ".lock"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_any_order_and_loss_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_parts, "FEWEST", 8)
    monkeypatch.setattr(evaluation_parts, "SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    model = image_model(Path("m.onnx"))
    pictures(Path("calib"), 4)
    pictures(Path("val"), 21)
    cells = [
        replace(
            one, config=replace(one.config, quantizer=one.axes["recipe"], images=4, report=False)
        )
        for one in (cell(name, model, "val") for name in ("deploy", "channelwise"))
        if one.config is not None
    ]
    for one in cells:
        assert run_cell(one, Path("out"), "mark").status == DONE
    wanted = {name: data for name, data in content(Path("out")).items() if name[0] != "."}
    assert sum(name.endswith("report.json") for name in wanted) == 2
    fates: tuple[Fate, ...] = (
        lambda task: True,
        lambda task: task.stage != FLOAT or task.part != (8, 16),
        lambda task: task.stage != PREPARE,
    )
    for seed, fate in enumerate(fates):
        for left in Path("out").iterdir():
            left.rename(f"{left.name}.{seed}")
        rows = in_turns(cells, Place(Path("out")), seed, fate)
        assert {row.status for row in rows} == {DONE}
        found = content(Path("out"))
        assert {name: data for name, data in found.items() if name[0] != "."} == wanted
        between = Path("out") / BETWEEN
        assert list((between / "cells/m").iterdir()) == []
        assert len(list(between.glob("prepared/*"))) == (fate is not fates[2])
        assert len(list(between.glob("floats/*/*/*.npy"))) == (2 if fate is fates[1] else 3)


def test_cores_and_memory_of_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(need, "model_bytes", lambda _: 10**9)
    one = cell("a")
    assert one.config is not None
    wide = replace(one, config=replace(one.config, threads=3, workers=2))
    assert [need.cores_of(wide, s) for s in (PREPARE, WRITE, FLOAT, MEASURE, FINISH)] == [
        1,
        6,
        3,
        3,
        3,
    ]
    apart = need.memory_of(one, MEASURE)
    assert need.memory_of(one, FLOAT) == need.memory_of(one, FINISH) == apart
    assert need.memory_of(one, PREPARE) < need.memory_of(one)
    assert need.memory_of(wide) - need.memory_of(one) == apart
