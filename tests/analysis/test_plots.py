"""The figure of error over blocks: points, scale, emphasis, determinism."""

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from sample_report import make_ops

from ptq_onnx.report.plots import LINES, save_png, series, snr_over_blocks

SVG = "{http://www.w3.org/2000/svg}"


def points(svg: str, role: str) -> list[tuple[float, float]]:
    """The corners of a role's line, in SVG units (y points down)."""
    group = ET.fromstring(svg).find(f".//{SVG}g[@id='snr-{role}']")
    assert group is not None, role
    path = group.find(f"{SVG}path")
    assert path is not None
    numbers = re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path.attrib["d"])
    return [(float(x), float(y)) for x, y in numbers]


def test_every_role_has_one_point_per_block() -> None:
    svg = snr_over_blocks(make_ops())
    drawn = set(re.findall(r'id="snr-(\w+)"', svg))
    assert drawn == set(LINES) - {"q", "k", "v"}
    for role in drawn:
        assert len(points(svg, role)) == 12


def test_heights_are_the_logarithms_of_the_ratios() -> None:
    """One affine map from log10(snr) to height holds for all lines."""
    ops = make_ops()
    svg = snr_over_blocks(ops)
    lines = series(ops)
    pairs = [
        (math.log10(snr), y)
        for role, values in lines.items()
        for snr, (_, y) in zip(values.values(), points(svg, role), strict=True)
    ]
    (a, low), (b, high) = min(pairs), max(pairs)
    slope = (high - low) / (b - a)
    assert slope < 0
    for x, y in pairs:
        assert y == pytest.approx(low + slope * (x - a), abs=0.01)
    steps = [x for x, _ in points(svg, "fc2")]
    assert steps == pytest.approx([steps[0] + i * (steps[1] - steps[0]) for i in range(12)])


def test_fc2_is_the_thickest_line_and_worst_at_its_peak() -> None:
    svg = snr_over_blocks(make_ops())
    widths = {
        role: float(found.group(1))
        for role in series(make_ops())
        if (found := re.search(rf'id="snr-{role}".*?stroke-width: ([\d.]+)', svg, re.DOTALL))
    }
    others = [width for role, width in widths.items() if role != "fc2"]
    assert widths["fc2"] > 2 * max(others)
    heights = [y for _, y in points(svg, "fc2")]
    assert heights.index(min(heights)) in (5, 6)


def test_text_is_the_same_every_time_and_holds_no_date() -> None:
    svg = snr_over_blocks(make_ops())
    assert svg == snr_over_blocks(make_ops())
    assert svg.startswith("<svg")
    assert svg.endswith("</svg>")
    assert "metadata" not in svg
    assert "date" not in svg.lower()
    assert svg != snr_over_blocks(make_ops(seed=1))


def test_text_takes_the_colour_of_the_page() -> None:
    svg = snr_over_blocks(make_ops())
    assert "currentColor" in svg
    assert "#010203" not in svg


def test_series_takes_the_worse_of_two_and_leaves_out_what_a_log_axis_cannot_show() -> None:
    ops = [op for op in make_ops(3) if op.role == "fc2"]
    twice = [*ops, replace(ops[0], snr=2.0), replace(ops[0], snr=1e-9)]
    assert series(twice)["fc2"][0] == 2.0
    strange = [replace(ops[0], snr=0.0), replace(ops[1], snr=math.inf), ops[2]]
    assert series(strange) == {"fc2": {2: ops[2].snr}}
    assert series([replace(ops[0], snr=math.nan)]) == {}
    assert series([replace(ops[0], block=None)]) == {}


@pytest.mark.parametrize("blocks", [0, 1, 48])
def test_any_depth_draws(blocks: int, tmp_path: Path) -> None:
    ops = make_ops(blocks)
    svg = snr_over_blocks(ops, tmp_path / "snr.png")
    ET.fromstring(svg)
    assert ("No error to draw" in svg) == (blocks == 0)
    assert Image.open(tmp_path / "snr.png").size == (1350, 660)
    assert [p.name for p in tmp_path.iterdir()] == ["snr.png"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    target = tmp_path / "there.png"
    target.mkdir()
    with pytest.raises(OSError, match=r"there\.png"):
        save_png(Figure(), target, 50)
    assert [p.name for p in tmp_path.iterdir()] == ["there.png"]
