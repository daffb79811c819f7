"""Every cell of the table: loads, is understood, stays itself, quantizes, runs, and agrees."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoo.architectures import torchvision_schemas
from zoo.cells import CELLS, EXPECTED, MUST, Cell, run

with torchvision_schemas():
    pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the exported files lie, for all cells."""
    return tmp_path_factory.mktemp("zoo")


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_cell(cell: Cell, folder: Path) -> None:
    if cell.fails is not None:
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the exporter raises
            run(cell, folder)
        return
    assert run(cell, folder).complaints(cell) == []


def test_the_table_is_complete() -> None:
    """Every architecture is tried, those that must work through all exporters."""
    assert len(CELLS) >= 70
    assert {cell.architecture for cell in CELLS} == set(EXPECTED)
    names = [cell.name for cell in CELLS]
    assert len(names) == len(set(names))
    for name in MUST:
        assert {f"{name}/{e}" for e in ("ts11", "ts14", "ts17", "ts20", "dy18", "dy23")} <= {*names}
