"""Every cell of the table: loads, is understood, stays itself, quantizes, runs, and agrees."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.architectures import ARCHITECTURES, torchvision_schemas
from zoo.cells import CELLS, EXPECTED, MUST, Cell, run, violated

with torchvision_schemas():
    pytest.importorskip("timm", exc_type=ImportError)
pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the exported files lie, for all cells."""
    return tmp_path_factory.mktemp("zoo")


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_cell(cell: Cell, folder: Path) -> None:
    assert run(cell, folder).complaints(cell) == []


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
