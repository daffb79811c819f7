"""The results of a sweep: the front, the page, the table and JSON hold the same figures."""

from __future__ import annotations

import csv
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ptq_onnx.report.scatter import Point, pareto, scatter, ticks
from ptq_onnx.sweep.cell import DONE, FAILED, REFUSED, Row
from ptq_onnx.sweep.matrix import AXES
from ptq_onnx.sweep.results import write_results

COLUMNS = ("top-1", "lost", "SQNR", "same", "size", "smaller", "time")


def row(recipe: str, bits: str, status: str = DONE, **more: Any) -> Row:
    axes = dict(zip(AXES, ("vit<s>", recipe, "onnxruntime", bits, "c", "0"), strict=True))
    name = f"vit<s>/{recipe}_onnxruntime_{bits.replace('/', '-')}_c_0"
    return Row(name, axes, status, **more)


def measured(recipe: str, bits: str, size: float, top1: float | None, sqnr: float) -> Row:
    figures: dict[str, Any] = {"float_bytes": 4_000_000, "quantized_bytes": int(size * 1e6)}
    figures |= {"top1": top1, "float_top1": None if top1 is None else 90.0, "sqnr_db": sqnr}
    return row(recipe, bits, agreement=97.5, images=100, page=True, seconds=2.5, notes=1, **figures)


ROWS = [
    measured("deploy", "8/8/8", 1.2, 89.5, 30.25),
    measured("deploy", "4/4/4", 1.0, 80.0, 11.0),
    measured("fqvit", "8/8/8", 1.3, 89.5, 20.0),
    row("fqvit", "4/4/4", FAILED, reason="<b>it</b> ended.", attempts=3),
    row("lowbit", "4/4/4", REFUSED, reason="no."),
]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    files = write_results(ROWS, tmp_path / "out", "s.yaml")
    assert [file.name for file in files] == ["sweep.html", "sweep.csv", "sweep.json"]
    return tmp_path / "out"


def test_known_fronts() -> None:
    def front(*points: tuple[float, float]) -> list[int]:
        return pareto([Point(x, y, "", "") for x, y in points])

    assert front((1, 1), (2, 2), (3, 1.5), (0.5, 0)) == [3, 0, 1]
    assert front((1, 1), (1, 2)) == [1]
    assert front((1, 2), (2, 2)) == [0]
    assert front((1, 1), (1, 1)) == [0]


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (88.2, 89.6, [88, 88.5, 89, 89.5, 90]), (3, 3, None)],
)
def test_round_marks_around_the_values(low: float, high: float, marks: list[float] | None) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    assert marks is None or found == marks


def test_the_drawing_leads_to_the_reports() -> None:
    points = [Point(1, 1, "a", "told <a>", "a%20b/report.html"), Point(2, 2, "b", "other")]
    text = scatter(points, "across", "up")
    assert text.count("<circle") == 2 + 2  # two kinds in the legend
    assert text.count('<a href="a%20b/report.html">') == 1
    assert "told &lt;a&gt;" in text
    assert "2 of them on the front" in text


def test_the_page(written: Path) -> None:
    text = (written / "sweep.html").read_text(encoding="utf-8")
    body = text.partition("<tbody>")[2].partition("</tbody>")[0]
    rows = re.findall(r'<tr class="([^"]*)">(.*?)</tr>', body, re.S)
    assert [kind.split() for kind, _ in rows] == [
        ["done", "front"], ["done", "front"], ["done"], ["failed"], ["refused"],
    ]  # fmt: skip
    cells = re.findall(r"<td[^>]*>(.*?)</td>", rows[0][1], re.S)
    assert cells[:2] == ["deploy", "8/8/8"]
    assert cells[2:9] == ["89.50", "0.50", "30.2", "97.5", "1.20", "3.33", "2.5"]
    assert 'href="vit%3Cs%3E/deploy_onnxruntime_8-8-8_c_0/report.html"' in cells[9]
    assert "1 note" in cells[9]
    assert html.escape("<b>it</b> ended.") in rows[3][1]
    assert "<b>it" not in text
    assert "vit<s>" not in text
    assert text.count("<svg") - text.count("`<svg") == 2  # one is in a script
    assert "5 cells: done 3, failed 1, refused 1" in text
    for address in re.findall(r'(?:src|href)="([^"#]+)"', text):
        assert not address.startswith(("http", "//"))


def test_the_table_and_json_hold_the_same(written: Path) -> None:
    with open(written / "sweep.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    cells = json.loads((written / "sweep.json").read_text())["cells"]
    assert len(table) == len(cells) == len(ROWS)
    for line, cell, one in zip(table, cells, ROWS, strict=True):
        assert line["cell"] == cell["cell"] == one.cell
        assert [line[axis] for axis in AXES] == [cell["axes"][axis] for axis in AXES]
        assert line["status"] == cell["status"] == one.status
        for name in ("top1", "sqnr_db", "quantized_bytes"):
            value = getattr(one, name)
            assert cell[name] == value
            assert line[name] == ("" if value is None else str(value))
        assert cell["run"]["attempts"] == one.attempts
        assert "seconds" not in cell


def test_a_page_without_any_result(tmp_path: Path) -> None:
    write_results([row("x", "8/8/8", FAILED, reason="r.")], tmp_path, "s.yaml")
    text = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    assert text.count("<svg") == text.count("`<svg")
    assert "failed: r." in " ".join(text.split())
