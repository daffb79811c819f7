"""Every file computes what its report says, as an oracle that shares no code with it computes it.

A covering part of the table always runs: every quantizer and target with half of the bits, every
network several times. ``-m oracle`` runs the rest, ``PYTHONPATH=.:tests python -m oracle`` prints
it all.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ptq_onnx import PtqError

from .cells import BITS, DIGITS, REFUSED, WAYS, WIDE, Cell, Result, bits_of, cells, compare, run
from .formats import Format, e4m3, log2_codes
from .networks import NETWORKS, images

ALWAYS_ON_DIGITS = (
    Cell(DIGITS, "fqvit/onnxruntime", "6/6/6"),
    Cell(DIGITS, "fqvit/integer", "6/6/6"),
    Cell(DIGITS, "deploy/onnxruntime", "8/8/8"),
)
STEM = "stem"
ALWAYS_ON_THE_STEM = {
    Cell(STEM, "deploy/onnxruntime", "8/8/8"): 2,
    Cell(STEM, "deploy/openvino", "8/8/8"): 4,
    Cell(STEM, "deploy/tensorrt", "8/8/8"): 4,
}
"""Ways that put convolutions on codes, and how many: for ONNX Runtime the first does not pay, and
the last is a linear."""


def covering() -> list[Cell]:
    """Half of the bits of each way, the networks by turns."""
    found: list[Cell] = []
    turn = 0
    for number, way in enumerate(WAYS):
        for cell in [c for c in cells(("plain",)) if c.way == way][number % 2 :: 2] or [
            Cell("plain", way, bits_of(way)[0])
        ]:
            refused = REFUSED.get(cell.target, ())
            names = [n for n in NETWORKS if n not in refused and n != STEM]
            if "partly" in way:
                names.remove("einsum")  # it has no k to keep
            found.append(Cell(names[turn % len(names)], way, cell.bits))
            turn += 1
    return [*found, *ALWAYS_ON_DIGITS, *ALWAYS_ON_THE_STEM]


ALWAYS = covering()
REST = [cell for cell in cells() if cell not in ALWAYS]


def check(cell: Cell, folder: Path) -> None:
    refused = cell.network in REFUSED.get(cell.target, ()) or (
        "partly" in cell.way and cell.network == "einsum"
    )
    if refused:
        with pytest.raises(PtqError) as error:
            run(cell, folder)
        assert "\n" not in str(error.value)
        return
    assert run(cell, folder).complaints() == []


@pytest.mark.parametrize(
    "cell", [c for c in ALWAYS if c not in ALWAYS_ON_THE_STEM], ids=lambda c: c.name
)
def test_a_file_computes_what_its_report_says(cell: Cell, tmp_path: Path) -> None:
    check(cell, tmp_path)


@pytest.mark.oracle
@pytest.mark.parametrize("cell", REST, ids=lambda c: c.name)
def test_so_does_every_other(cell: Cell, tmp_path: Path) -> None:
    check(cell, tmp_path)


@pytest.mark.parametrize("cell", ALWAYS_ON_THE_STEM, ids=lambda c: c.name)
def test_the_convolutions_of_the_stem_are_on_codes(cell: Cell, tmp_path: Path) -> None:
    check(cell, tmp_path)
    (path,) = tmp_path.glob("*/quantized.onnx")
    model = onnx.load(path)
    made = {output: node.op_type for node in model.graph.node for output in node.output}
    inputs = [made.get(n.input[0]) for n in model.graph.node if n.op_type == "Conv"]
    assert inputs.count("DequantizeLinear") == ALWAYS_ON_THE_STEM[cell]


def test_the_cells_cover_everything() -> None:
    assert {c.way for c in ALWAYS} == {*WAYS}
    assert {c.bits for c in ALWAYS} == {*BITS, *WIDE}
    networks = Counter(c.network for c in ALWAYS)
    assert networks.keys() == {*NETWORKS, DIGITS}
    assert min(networks.values()) >= 2


def test_nothing_of_the_package_is_used_but_quantize() -> None:
    allowed = {"QuantizeConfig", "quantize", "PtqError"}
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("ptq_onnx") for name in node.names)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ptq_onnx"):
                assert node.module == "ptq_onnx"
                assert {name.name for name in node.names} <= allowed


# --- the oracle notices ---------------------------------------------------------------------------

Entry = dict[str, Any]


def _first(report: Entry, role: str, key: str = "bits") -> Entry:
    """The first tensor of a role whose entry has the key."""
    return next(e for e in report["tensors"] if e["role"] == role and key in e)


def _scale(report: Entry) -> None:
    entry = _first(report, role="norm1")
    entry["scale"] *= 1.02


def _zero(report: Entry) -> None:
    _first(report, role="norm2")["zero_point"] += 1


def _weight(report: Entry) -> None:
    entry = _first(report, role="fc1.weight")
    entry["scale"][3] *= 1.2


def _alpha(report: Entry) -> None:
    entry = _first(report, role="gelu", key="alpha")
    values = entry["alpha"]["values"]
    entry["alpha"]["values"] = [values[-1], *values[:-1]]


def _factor_of_q(report: Entry) -> None:
    entry = _first(report, role="q", key="alpha")
    entry["alpha"]["values"] = [0] * len(entry["alpha"]["values"])


def _sums(report: Entry) -> None:
    _first(report, role="softmax")["renormalize"] = False


def _bits(report: Entry) -> None:
    entry = _first(report, role="v")
    entry["limits"] = [0, 31]


CHANGES: tuple[Callable[[Entry], None], ...] = (
    _scale, _zero, _weight, _alpha, _factor_of_q, _sums, _bits,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain network by fqvit in 6 bits."""
    cell, place = Cell("plain", "fqvit/onnxruntime", "6/6/6"), tmp_path_factory.mktemp("plain")
    assert run(cell, place).complaints() == []
    return place / cell.name.replace("/", "_")


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__.strip("_"))
def test_another_number_in_the_report_is_noticed(
    folder: Path, tmp_path: Path, change: Callable[[Entry], None]
) -> None:
    report = json.loads((folder / "report.json").read_text())
    change(report)
    for path in folder.iterdir():
        if path.suffix == ".onnx":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert result_of(tmp_path).complaints()


def result_of(folder: Path) -> Result:
    return compare(folder, images(20)[16:])


# --- its own arithmetic ---------------------------------------------------------------------------


def test_numbers_by_hand() -> None:
    """One value of each code, worked out on paper."""
    a = np.array([1, 0.7, 0.5, 1 / 3, 0.25, 1 / 6, 0.0])
    assert log2_codes(a, 15).tolist() == [0, 0, 1, 2, 2, 3, 15]
    x = np.array([0.3, 17.0, 18.9, 1000.0, -0.001, 2.0**-10])
    assert e4m3(x).tolist() == [0.3125, 16, 18, 448, -(2.0**-9), 0.0]
    entry = {
        "tensor": "x", "role": "other", "parameter": False, "bits": 4, "signed": False,
        "code": "uniform", "granularity": "ptf", "renormalize": False, "centred": False,
        "block_size": 0, "limits": [0, 15], "stored": "uint8", "axis": None, "scale": 0.5,
        "zero_point": 3, "alpha": {"shape": [2], "values": [0, 2]},
    }  # fmt: skip
    coded = Format.of(entry).apply(np.array([[1.3, 1.3], [100.0, -5.0]]))
    assert coded.codes.tolist() == [[6, 4], [15, 0]]
    assert coded.values.tolist() == [[1.5, 2.0], [6.0, -6.0]]


def test_the_report_names_the_model_that_was_quantized(tmp_path: Path) -> None:
    """formed.onnx where the model was changed, fused.onnx where it was not, never both."""
    for way, formed in (("fqvit/integer", False), ("deploy/tensorrt", True)):
        run(Cell("plain", way, "8/8/8"), tmp_path)
        made = tmp_path / Cell("plain", way, "8/8/8").name.replace("/", "_")
        report = json.loads((made / "report.json").read_text())
        assert report["formed"] == ("formed.onnx" if formed else "fused.onnx")
        assert (made / "formed.onnx").exists() is formed
