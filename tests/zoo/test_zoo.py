"""Every cell of the table: loads, is understood, stays itself, quantizes, runs, and agrees.

A covering part always runs: every architecture by every quantizer, every exporter with some.
``-m full_matrix`` runs the rest.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.architectures import ARCHITECTURES, torchvision_schemas
from zoo.cells import ALWAYS, CELLS, EXPECTED, FIRST, MUST, QUANTIZERS, Cell, run, violated
from zoo.exporters import EXPORTERS

with torchvision_schemas():
    pytest.importorskip("timm", exc_type=ImportError)
pytest.importorskip("transformers")


@pytest.mark.parametrize("cell", ALWAYS, ids=lambda cell: cell.name)
def test_cell(cell: Cell, exports: Path) -> None:
    check(cell, exports, ALWAYS[cell])


@pytest.mark.full_matrix
@pytest.mark.parametrize("cell", [c for c in CELLS if c not in FIRST], ids=lambda cell: cell.name)
def test_every_other_cell(cell: Cell, exports: Path) -> None:
    check(cell, exports, tuple(QUANTIZERS))


def check(cell: Cell, folder: Path, quantizers: tuple[str, ...]) -> None:
    assert run(cell, folder, quantizers).complaints(cell) == []


@pytest.mark.full_zoo
@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.full is not None])
def test_full_size(name: str, tmp_path: Path) -> None:
    """The published sizes, random weights: found, unchanged, quantized, running."""
    import numpy as np

    from ptq_onnx.preparation import model_files as graphs
    from ptq_onnx.preparation.prepare import prepare
    from ptq_onnx.qdq.lowering import lower
    from zoo import checks
    from zoo.architectures import make
    from zoo.exporters import export

    path = export(name, "dy23" if name == "aimv2" else "ts17", tmp_path / "full.onnx", full=True)
    prepared = prepare(path)
    images = np.random.default_rng(0).standard_normal((2, *make(name, True)[1])).astype(np.float32)
    reference = checks.run(str(path), images, optimize=False)
    fused = checks.run(graphs.serialize(prepared.model), images)
    # Deep float32 networks: as far as ONNX Runtime's own optimizer moves the file, at most twice.
    moved = checks.relative_error(checks.run(str(path), images), reference)
    assert checks.relative_error(fused, reference) <= max(1e-4, 2 * moved)
    assert prepared.blocks.unrecognised == ()
    for quantizer in ("deploy", "fqvit"):
        found = checks.quantized(prepared, images, quantizer=quantizer)
        file = graphs.serialize(lower(found.model, found.specs))
        assert violated(file) == []
        checks.run(file, images)


def test_the_table_is_complete() -> None:
    """Every architecture is tried, those that must work through all exporters."""
    assert len(CELLS) >= 70
    assert {cell.architecture for cell in CELLS} == set(EXPECTED)
    names = [cell.name for cell in CELLS]
    assert len(names) == len(set(names))
    for name in MUST:
        assert {f"{name}/{e}" for e in ("ts11", "ts14", "ts17", "ts20", "dy18", "dy23")} <= {*names}


def test_what_always_runs_covers_the_table() -> None:
    """Every architecture by every quantizer, every exporter, those that must work through
    TorchScript in two opsets and through dynamo, and what is expected otherwise than elsewhere."""
    assert {cell.architecture for cell in FIRST} == {*EXPECTED}
    assert all(ALWAYS[cell] == tuple(QUANTIZERS) for cell in FIRST)
    assert {cell.exporter for cell in ALWAYS} == {*EXPORTERS} == {cell.exporter for cell in CELLS}
    assert {*ALWAYS} >= {cell for cell in CELLS if cell.expected or cell.leftover}
    for name in MUST:
        tried = [cell.exporter for cell in ALWAYS if cell.architecture == name]
        assert sum(exporter.startswith("ts") for exporter in tried) >= 2, name
        assert any(exporter.startswith("dy") for exporter in tried), name
    alone = [name for names in ALWAYS.values() if len(names) == 1 for name in names]
    assert min(alone.count(name) for name in QUANTIZERS) >= len(alone) // 2
