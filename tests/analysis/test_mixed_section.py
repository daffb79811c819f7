"""The page's part on mixed widths: a bit width for every role and block, and a plot."""

from __future__ import annotations

from typing import Any

from sample_report import make_report

from ptq_onnx.report.mixed_section import mixed_section
from ptq_onnx.report.page import render

POINT = {"megabytes": 3.1, "uniform_weights_db": None, "uniform_activations_db": None}


def made() -> dict[str, Any]:
    modules = [
        {"module": "m", "part": part, "role": role, "block": block, "elements": 64, "bits": bits,
         "noise": 1e-3}
        for part, role, block, bits in (
            ("activations", "norm1", 0, 5), ("activations", "norm1", 1, 3),
            ("weights", "fc1.weight", 1, 4), ("weights", "head.weight", None, 8),
        )
    ]  # fmt: skip
    points = [
        {**POINT, "bits": 3, "weights_db": 9.0, "activations_db": 8.0},
        {**POINT, "bits": 4, "weights_db": 15.0, "activations_db": 14.0,
         "uniform_weights_db": 12.5, "uniform_activations_db": 11.0},
    ]  # fmt: skip
    return {
        "by": "output", "target_bits": None, "target_size": None, "weights": [4.0, 3.98],
        "activations": [4.0, 4.0], "megabytes": 3.1, "images": 16, "modules": modules,
        "points": points, "more_bits": ["norm1@0=5"], "seconds": 3.0,
    }  # fmt: skip


def test_rows_are_roles_and_columns_blocks() -> None:
    found = mixed_section(made())
    assert found is not None
    assert found["blocks"] == [0, 1]
    assert found["rows"] == [
        {"role": "norm1", "alone": None, "bits": [5, 3]},
        {"role": "fc1.weight", "alone": None, "bits": [None, 4]},
        {"role": "head.weight", "alone": 8, "bits": [None, None]},
    ]
    assert found["plot"].count("<title>") == 1 + 6
    assert "weights, alike: 4 bits, 12.5 dB" in found["plot"]
    assert mixed_section(None) is None


def test_the_page_has_it_where_widths_were_mixed() -> None:
    report = make_report()
    assert 'id="mixed"' not in render(report, "<svg></svg>", [])
    page = render({**report, "mixed": made()}, "<svg></svg>", [])
    assert '<a href="#mixed">' in page
    assert "measured on 16 images" in page
    assert "3.98 bits in the mean" in page
    row = page.split('<td class="t">norm1</td>')[1].split("</tr>")[0]
    assert row.replace("\n", "") == '<td class="n">5</td><td class="n">3</td><td class="n"></td>'
