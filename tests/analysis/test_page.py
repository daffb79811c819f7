"""The page as its reader meets it: order, links, words, and what machines find wrong with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_report import make_attention, make_ops, make_report

from ptq_onnx.analysis.variation_results import ChannelRanges
from ptq_onnx.report.attention_page import sheet
from ptq_onnx.report.page import render
from ptq_onnx.report.plots import LINES, snr_over_blocks, worst_point
from ptq_onnx.report.summary import two_figures
from ptq_onnx.report.svg import box_plot, channel_bands, heat_map, map_limit, rollout_maps

CHROMIUM = next((p for n in ("chromium", "google-chrome") if (p := shutil.which(n))), None)
AXE = os.environ.get("AXE_CORE", "")
"""axe.min.js of npm's axe-core, where the accessibility of the page is to be tested."""


def full_report() -> dict[str, Any]:
    """The sample with histograms, a coverage and paths."""
    report = make_report()
    ops = report["analysis"]["ops"]
    tensors = [t for t in report["tensors"] if not t["parameter"]][:40]
    for op, tensor in zip(sorted(ops, key=lambda o: -o["snr"]), tensors, strict=False):
        op["tensor"] = tensor["tensor"]
    report["analysis"]["variation"] = {
        "images": 4, "kinds": [], "outliers": [],
        "norm_inputs": [{"tensor": "t", "role": "embed", "block": None, "reader": "blocks.0.norm1",
                         "low": [-1.0, -2.0], "high": [1.0, 3.0],
                         "box": [1.0, 1.0, 2.0, 3.0, 3.0]}],
        "tensors": [
            {"tensor": t["tensor"], "role": t["role"], "block": t["block"], "parameter": False,
             "low": -1.0, "high": 1.0, "absolute_mean": 0.5, "sdam": None, "sdam_heads": None,
             "kurtosis": 3.0, "channels": 1, "channel_ratio": None, "clip": [-1.0, 1.0],
             "clipped": 0.0, "snr": 1e-4, "snr_db": 40.0, "clip_noise": 0.0, "clip_of": "values",
             "histogram": {"low": -1.0, "high": 1.0, "float_counts": [1, 2, 900000],
                           "quantized_counts": [1, 2, 3]}}
            for t in tensors],
    }  # fmt: skip
    report["analysis"]["sensitivity"] = report["analysis"]["attention"] = None
    report["coverage"] = {
        "percent": 92.8, "line": "In integers: 92.8 %.", "reasons": [], "warning": None,
        "linears": {"integer": 26, "all": 26}, "convolutions": {"integer": 0, "all": 0},
        "attention": {"integer": 6, "all": 12},
    }  # fmt: skip
    return report


@pytest.fixture(scope="module")
def page() -> str:
    sheets = [sheet(make_attention(3), "Block 11, cat.jpg")]
    ops = make_ops()
    return render(full_report(), snr_over_blocks(ops), [], narrow=snr_over_blocks(ops, narrow=True),
                  sheets=sheets)  # fmt: skip


def test_order_and_contents(page: str) -> None:
    sections = re.findall(r'<section id="([^"]+)">', page)
    assert sections == [
        "todo", "worst", "over-blocks", "maps", "all-ops", "variation", "values", "coded",
        "floats", "model", "reproduce", "notes",
    ]  # fmt: skip
    contents = page.split('aria-label="Contents"')[1].split("</nav>")[0]
    assert re.findall(r'href="#([^"]+)"', contents) == sections
    assert page.index('id="verdict"') < page.index('id="todo"')


def test_every_link_has_its_place(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page.split("<script")[0])
    links = re.findall(r'href="#([^"]+)"', page)
    assert len(links) > 100
    assert set(links) <= set(ids)
    assert len(set(ids)) == len(ids)


def test_a_figure_leads_to_its_histogram_scale_and_range(page: str) -> None:
    report = full_report()
    histograms = json.loads(page.split('id="histograms">')[1].split("</script>")[0])
    worst = page.split('id="worst-ops"')[1].split("</table>")[0]
    found = re.findall(r'<a href="#(tensor-(\d+))" data-place="(\d+)">([\d.]+)</a>', worst)
    assert found
    by_name = {op["tensor"]: op for op in report["analysis"]["ops"] if op["tensor"]}
    for row, index, place, shown in found:
        name = report["tensors"][int(index)]["tensor"]
        assert histograms[int(place)]["told"].startswith(f"{name}: 8 bits")
        assert histograms[int(place)]["row"] == row
        assert shown in (f"{by_name[name]['snr_db']:.1f}", "40.0")


def test_names_can_be_copied(page: str) -> None:
    worst = page.split('id="worst-ops"')[1].split("</table>")[0]
    assert worst.count("<tr>") == 11
    pairs = re.findall(r'<code>([^<]+)</code><button type="button" class="copy"'
                       r' aria-label="Copy ([^"]+)">', worst)  # fmt: skip
    assert len(pairs) == 10
    assert all(name == told for name, told in pairs)


def test_cards_tell_the_share_in_integers_and_no_speed_that_nobody_measured(page: str) -> None:
    cards = dict(re.findall(r'class="card"><span>([^<]+)</span><b>([^<]+)</b>', page))
    assert cards["MACs in integers"] == "92.8 %"
    assert cards["Speed-up"] == "not measured"
    assert "needs ptq-onnx benchmark fused.onnx quantized.onnx" in page
    assert "26 of 26 linears, 6 of 12 attention products" in page


def test_two_figures_say_why_they_differ() -> None:
    report = make_report(1)
    report["fidelity"]["source"] = "val"
    report["analysis"]["logits"] = {"snr": 1e-3, "snr_db": 30.0}
    text = two_figures(report)
    assert text is not None
    assert "21.4 dB, is that of the written file in its runtime on all 500 images of --val" in text
    assert "30.0 dB is that of the simulation on 32 images" in text
    assert "They differ because the images are others" in text
    assert "rounding is chaotic" in text
    report["fidelity"] |= {"source": "held apart", "images": 32}
    assert "the images are others" not in str(two_figures(report))
    report["analysis"]["logits"] = {"snr": 0.0, "snr_db": None}
    assert "exact is that of the simulation" in str(two_figures(report))
    assert two_figures(make_report(1)) is None


@pytest.mark.parametrize("role", ["norm1", "qk"])
def test_the_worst_role_is_thick_and_named_at_its_line(role: str) -> None:
    from dataclasses import replace

    ops = [replace(op, snr=0.5) if (op.role, op.block) == (role, 4) else op for op in make_ops()]
    assert worst_point({"fc1": {0: 0.1}, role: {4: 0.5}}) == (role, 4)
    for narrow, start in ((False, "snr"), (True, "narrow")):
        svg = snr_over_blocks(ops, narrow=narrow)
        roles = "|".join(LINES)
        pattern = rf'id="{start}-({roles})".*?stroke-width: ([\d.]+)'
        widths = {r: float(w) for r, w in re.findall(pattern, svg, re.DOTALL)}
        assert max(widths, key=lambda r: widths[r]) == role
        assert f">{role}, block 4: 3.0 dB</text>" in svg
        assert f"The largest is {role} of block 4, 3.0 dB.</desc>" in svg
        assert svg.count("#d9403a") >= 1


def test_every_drawing_has_a_title_a_description_and_named_axes(page: str) -> None:
    norm = ChannelRanges("t", "embed", None, "norm", (-1.0,), (2.0,), (1.0, 1.0, 2.0, 2.0, 3.0))
    drawings = {
        box_plot([norm]): ("largest |x| of a channel (no unit)", "LayerNorm that reads"),
        channel_bands(norm): ("value (no unit)", "channel (number)"),
        heat_map({("fc1", 0): 3.0}, ["fc1"], 1, "dB"): ("block", "role"),
        rollout_maps({"float": [[0.0, 1.0]]}): ("patches of the image",),
    }
    for svg, labels in drawings.items():
        assert re.match(r'<svg [^>]*role="img"[^>]*><title>[^<]+</title><desc>[^<]+</desc>', svg)
        for label in labels:
            assert label in svg
    for svg in re.findall(r"<svg [^>]*>.{40}", page.split("<script")[0], re.DOTALL):
        assert 'role="img"' in svg
        assert "<title>" in svg
    assert "values in a bin" in page
    assert "value (no unit)" in page


def test_maps_state_their_limits(page: str) -> None:
    assert "they end at percentile 95 of these maps" in page
    assert "LIS" in page.split('id="maps"')[1][:900]
    rows = [[0.0] * 19 + [100.0]]
    assert map_limit([1.0] * 40 + [90.0]) == 1.0
    assert "percentile 95" in rollout_maps({"float": rows})
    assert page.count('class="cells"') == 3
    assert page.count('alt="Head ') == 9


def test_no_error_reads_exact(page: str) -> None:
    assert "200.0" not in page.split("<main>")[1].split("<script")[0]
    last = page.split('id="ops"')[1].split("</table>")[0].split("<tr")[-1]
    assert 'data-v="1e999">exact</td>' in last


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    folder = tmp_path_factory.mktemp("browser")

    def run(text: str, *more: str) -> str:
        (folder / "page.html").write_text(text, encoding="utf-8")
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", *more,
            f"--user-data-dir={folder / 'profile'}", (folder / "page.html").as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    return run


def test_at_most_ten_pages_are_printed(
    page: str, browse: Callable[..., str], tmp_path: Path
) -> None:
    browse(page, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    content = (tmp_path / "page.pdf").read_bytes()
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", content)) <= 10
    assert "report.json holds all, under analysis.ops" in page


AUDIT = """<script>AXE</script><script>
const seen = { wide: document.documentElement.scrollWidth > innerWidth };
document.querySelectorAll("details").forEach((d) => { d.open = true; });
const link = document.querySelector("#worst-ops a[data-place]");
link.click();
seen.told = document.getElementById("told").textContent;
seen.at = location.hash;
axe.run(document, { resultTypes: ["violations"] }).then((result) => {
  seen.found = result.violations.map((v) => `${v.impact} ${v.id} ${v.nodes[0].html}`);
  document.body.innerHTML = "";
  const out = document.createElement("pre");
  out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
});
</script>"""


@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_serious_is_wrong_with_the_page(
    page: str, browse: Callable[..., str], width: int
) -> None:
    if not Path(AXE).is_file():
        pytest.skip("AXE_CORE names no axe.min.js (npm install axe-core)")
    audit = AUDIT.replace("AXE", Path(AXE).read_text(encoding="utf-8"), 1)
    text = browse(page.replace("</body>", audit + "</body>"), "--dump-dom",
                  f"--window-size={width},900", "--virtual-time-budget=60000")  # fmt: skip
    found = re.search(r'<pre id="seen">(.*?)</pre>', text, re.DOTALL)
    assert found is not None
    seen = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert [v for v in seen["found"] if v.startswith(("serious", "critical"))] == []
    assert "8 bits" in seen["told"]
    assert seen["at"] == "#values"
    assert not seen["wide"]
