"""The command analyse: one report with all parts, whose JSON keeps its schema, in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from prepared_models import DIGITS, ROOT
from typer.testing import CliRunner

import ptq_onnx
from ptq_onnx.analysis.results import Analysis, Graphwise, Sensitivity
from ptq_onnx.analysis.variation_results import Variation
from ptq_onnx.cli.app import app
from ptq_onnx.config.quantize_config import QuantizeConfig
from ptq_onnx.errors import ConfigError
from ptq_onnx.evaluation.evaluate import evaluate
from ptq_onnx.images.opening import open_images
from ptq_onnx.pipeline.preprocessing import resolve_preprocess
from ptq_onnx.pipeline.quantize import Result, quantize
from ptq_onnx.report.schema import report_schema, text, violations

CHROMIUM = next((p for n in ("chromium", "google-chrome") if (p := shutil.which(n))), None)
CALIB = ROOT / "img/digits/calib"
VAL = ROOT / "img/digits/val"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The embedded model, everything analysed, on two images."""
    config = QuantizeConfig(
        quantizer="vanilla", images=16, analysis_images=2, sensitivity=True, threads=1
    )
    return quantize(
        DIGITS, config=config, calib=CALIB, output=tmp_path_factory.mktemp("analyse") / "out",
        keep_models=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((result.output / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def page(result: Result) -> str:
    return (result.output / "report.html").read_text(encoding="utf-8")


def test_only_the_report_is_written(result: Result) -> None:
    names = {p.name for p in result.output.iterdir()}
    assert names == {"report.json", "report.html", "config.yaml", "attention", ".ptq_onnx.json"}


def test_python_gets_dataclasses(result: Result, report: dict[str, Any]) -> None:
    found = result.analysis
    assert isinstance(found, Analysis)
    assert isinstance(found.graphwise, Graphwise)
    assert isinstance(found.sensitivity, Sensitivity)
    assert isinstance(found.variation, Variation)
    assert report["analysis"] == json.loads(json.dumps(found.to_json()))
    assert found.graphwise.held_apart
    assert ptq_onnx.Result is Result


def test_the_schema_file_is_that_of_the_code_and_the_report_keeps_it(
    report: dict[str, Any],
) -> None:
    path = ROOT / "ptq_onnx/report/report.schema.json"
    assert path.read_text(encoding="utf-8") == text()
    assert violations(report, report_schema()) == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda r: r.pop("sizes"), "no 'sizes'"),
        (lambda r: r["analysis"]["ops"][3].update(snr="big"), "ops[3].snr: expected number"),
        (lambda r: r["analysis"]["variation"]["norm_inputs"][0]["box"].pop(), "box: 4 items"),
        (lambda r: r["analysis"]["ops"][0].update(more=1), "unknown key 'more'"),
        (lambda r: r["tensors"][0].update(code="ternary"), "'ternary' is none of"),
        (lambda r: r["analysis"]["sensitivity"].update(images=True), "images: expected integer"),
    ],
)
def test_a_broken_report_breaks_the_schema(report: dict[str, Any], change: Any, where: str) -> None:
    broken = json.loads(json.dumps(report))
    change(broken)
    assert any(where in line for line in violations(broken, report_schema()))


def test_a_report_without_analysis_keeps_the_schema(short: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(quantizer="vanilla", images=4, report=False, threads=1)
    quantize(short, config=config, calib=CALIB, output=tmp_path / "out")
    data = json.loads((tmp_path / "out/report.json").read_text())
    assert violations(data, report_schema()) == []


def cells(page: str, table: str) -> list[list[str]]:
    """The sort keys, or texts, of a table's rows."""
    body = page.split(f'id="{table}"')[1].split("<tbody>")[1].split("</tbody>")[0]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", body, re.DOTALL)
    out = []
    for row in rows:
        found = re.findall(r"<td([^>]*)>(.*?)</td>", row, re.DOTALL)
        keys = [re.search(r'data-v="([^"]*)"', a) for a, _ in found]
        out.append([
            k.group(1) if k else re.sub("<[^>]+>", "", t).strip()
            for k, (_, t) in zip(keys, found, strict=True)
        ])  # fmt: skip
    return out


def test_every_module_of_the_json_is_a_row(report: dict[str, Any], page: str) -> None:
    sensitivity = report["analysis"]["sensitivity"]
    rows = cells(page, "modules")
    assert len(rows) == len(sensitivity["layerwise"])
    left = {(m["module"], m["scope"], m["part"]): m for m in sensitivity["leave_one_out"]}
    for row, one in zip(rows, sensitivity["layerwise"], strict=True):
        assert row[:3] == [one["module"], one["scope"], one["part"]]
        assert float(row[4]) == one["error"]["snr"]
        assert float(row[5]) == one["error"]["snr_db"]
        other = left.get((one["module"], one["scope"], one["part"]))
        gain = None if other is None else other["gain_db"]
        without = other is not None and other["error"]["snr"] == 0  # nothing is left of the error
        assert row[12] == ("1e999" if without else "" if gain is None else repr(gain))
        assert without == (other is not None and gain is None)
    assert len(left) < len(rows)


def test_every_cell_of_the_heat_map_is_in_the_json(report: dict[str, Any], page: str) -> None:
    sensitivity = report["analysis"]["sensitivity"]
    heat = page.split('id="heat-layerwise"')[1].split("</svg>")[0]
    titles = dict(re.findall(r"<title>(blocks\.[^:]+): (-?[\d.]+) dB</title>", heat))
    expected = {
        m["module"]: m["error"]["snr_db"]
        for m in sensitivity["layerwise"]
        if m["scope"] == "op" and m["part"] == "all" and m["block"] is not None
    }
    assert set(titles) == set(expected)
    for name, value in expected.items():
        assert float(titles[name]) == pytest.approx(value, abs=0.006)
    heat = page.split('id="heat-leave-one-out"')[1].split("</svg>")[0]
    gains = dict(re.findall(r"<title>(blocks\.[^:]+): (-?[\d.]+) dB</title>", heat))
    for one in sensitivity["leave_one_out"]:
        if one["module"] in gains:
            assert float(gains[one["module"]]) == pytest.approx(one["features_gain_db"], abs=0.006)
    assert set(gains) == set(expected)


def test_tables_of_variation_and_attention(report: dict[str, Any], page: str) -> None:
    analysis = report["analysis"]
    assert len(cells(page, "varied")) == len(analysis["variation"]["tensors"])
    assert len(cells(page, "kinds")) == len(analysis["variation"]["kinds"])
    rows = cells(page, "attention")
    # Four codes, the model's own, and its maps with everything quantized.
    assert len(rows) == 6 * len(analysis["attention"]["blocks"])
    first = analysis["attention"]["blocks"][0]["codes"][0]
    assert float(rows[0][2]) == first["snr_db"]
    assert float(rows[0][3]) == first["rank"]
    histograms = json.loads(page.split('id="histograms">')[1].split("</script>")[0])
    by_counts = {tuple(t["histogram"]["float_counts"]) for t in analysis["variation"]["tensors"]}
    assert {tuple(h["f"]) for h in histograms} == by_counts
    assert page.count("<svg") >= 8
    for advice in analysis["advice"]:
        assert advice.split(":")[0] in page


def test_every_number_of_every_table_is_in_the_json(report: dict[str, Any], page: str) -> None:
    """As it is, or as a percentage; apart from the row's own number and its rank."""
    numbers: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers.update((repr(float(value)), repr(float(100 * value))))
        for item in (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        ):
            collect(item)

    collect(report)
    tables = re.findall(r'<table class="[^"]*" id="([^"]*)"', page)
    assert set(tables) >= {"ops", "modules", "blocks", "outliers", "kinds", "varied", "attention",
                           "tensors"}  # fmt: skip
    checked = 0
    for table in tables:
        for line, row in enumerate(cells(page, table)):
            for place, shown in enumerate(row):
                number = re.fullmatch(r"-?[\d.]+(e[-+]?\d+)?", shown)
                # -1 sorts names that are in no block, 1e999 what JSON has as null: no error.
                if number is None or shown in ("-1", "1e999"):
                    continue
                if table == "worst-ops" and place == 0:
                    assert float(shown) == line + 1
                    continue
                if table == "ops" and place < 2:
                    assert place or float(shown) == line
                    continue
                assert repr(float(shown)) in numbers, (table, line, place, shown)
                checked += 1
    assert checked > 5_000


PROBE = """<script>
const seen = {errors: 0};
addEventListener("error", () => seen.errors++);
const keys = (t, n) => [...document.getElementById(t).tBodies[0].rows].map((r) => r.cells[n].dataset.v);
document.querySelectorAll("#modules th button")[5].click();
seen.modules = keys("modules", 5).map(Number);
const choice = document.getElementById("histogram-choice");
const bars = () => document.querySelector("#histogram svg").outerHTML;
const before = bars();
choice.value = 5; choice.dispatchEvent(new Event("change"));
seen.changed = bars() !== before;
seen.bars = document.querySelectorAll("#histogram rect").length;
seen.requests = performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:"));
document.body.innerHTML = "";
const out = document.createElement("pre");
out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
</script>"""  # noqa: E501


def test_the_page_works_in_a_browser(page: str, report: dict[str, Any], tmp_path: Path) -> None:
    """Tables sort, histograms change, nothing is asked for, the console stays silent."""
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    (tmp_path / "page.html").write_text(page.replace("</body>", PROBE + "</body>"), "utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
        "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
        (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    seen = json.loads(found.group(1))
    layerwise = report["analysis"]["sensitivity"]["layerwise"]
    assert seen["modules"] == sorted(m["error"]["snr_db"] for m in layerwise)
    assert seen["changed"]
    assert seen["bars"] == 64
    assert seen["errors"] == 0
    assert seen["requests"] == []


def test_nothing_comes_from_outside_and_the_page_is_small(page: str) -> None:
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert addresses
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert len(page) < 1_500_000


def test_size_grows_with_numbers_not_with_weights(page: str) -> None:
    """ViT-B has twice the blocks and 12 times the channels: far below 5 MB."""
    bands = re.findall(r'<path d="([^"]*)" class="band"', page)
    assert len(bands) == 4
    per_channel = max(map(len, bands)) / 64
    assert 4 * 768 * per_channel + 2.5 * (len(page) - sum(map(len, bands))) < 5_000_000


def test_the_picture_stands_beside_its_rollout(
    page: str, result: Result, report: dict[str, Any]
) -> None:
    rollout = report["analysis"]["attention"]["rollout"]
    name = Path(rollout["image_name"]).stem
    assert (result.output / "attention" / f"picture_{name}.png").exists()
    beside = page.split('id="rollout"')[1].split("</figure>")[1]
    assert f"{rollout['image_name']}, as the model sees it" in beside
    assert '<img id="picture" src="data:image/png;base64,' in beside


def test_heads_that_are_not_there_are_refused(short: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(quantizer="vanilla", attention_heads=(1, 4), threads=1)
    with pytest.raises(ConfigError, match=r"^--attention-heads 4: the model has 4 heads"):
        quantize(short, config=config, calib=CALIB, output=tmp_path / "out")
    with pytest.raises(ConfigError, match="--attention-heads -1: must be from 0 to 9999"):
        QuantizeConfig(attention_heads=(-1,))


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    for arguments, words in (
        (["analyse", str(tmp_path / "none.onnx")], "does not exist"),
        (["analyse", str(DIGITS), "--quantizer", "magic"], "no quantizer 'magic'"),
        (["compare", str(tmp_path)], "--val"),
        (["compare", str(tmp_path), "--val", str(CALIB)], "holds no quantized.onnx"),
    ):
        command = [sys.executable, "-m", "ptq_onnx", *arguments, "--output", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1
        assert words in done.stderr
        assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, ["analyse", "--help"]).exit_code == 0


def test_numbers_are_finite(report: dict[str, Any]) -> None:
    def walk(value: Any) -> None:
        if isinstance(value, float):
            assert np.isfinite(value)
        for item in (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        ):
            walk(item)

    walk(report)


def test_a_network_without_blocks(tmp_path: Path) -> None:
    """A convolution and a linear: no blocks, no attention, no norms, and still a report."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(8, 3, 3, 3)) * 0.3, "v": rng.normal(size=(8, 10))}
    helper = onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("GlobalAveragePool", ["r"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("MatMul", ["f", "v"], ["y"]),
        ],
        "cnn",
        [helper.make_tensor_value_info("x", 1, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("y", 1, ["batch", 10])],
        [onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "cnn.onnx"))
    config = QuantizeConfig(
        quantizer="vanilla", images=4, analysis_images=2, sensitivity=True, threads=1
    )
    found = quantize(tmp_path / "cnn.onnx", config=config, calib=CALIB, output=tmp_path / "out")
    assert found.analysis is not None
    assert found.analysis.attention is None
    assert found.analysis.sensitivity is not None
    assert violations(json.loads((tmp_path / "out/report.json").read_text()), report_schema()) == []
    alone = {(s.module, s.part): s.error for s in found.analysis.sensitivity.layerwise}
    assert alone["model", "all"] == found.analysis.sensitivity.baseline


def test_rounded_weights_are_compared_with_the_float_ones(tmp_path: Path) -> None:
    """The logits err in the report as they do in the file, on other images."""
    config = QuantizeConfig(
        quantizer="deploy", rounding="gptq", bits="3/8/8", images=16, analysis_images=8,
        pictures=False, threads=1,
    )  # fmt: skip
    found = quantize(DIGITS, config=config, calib=CALIB, val=VAL, output=tmp_path / "out")
    assert found.analysis is not None
    logits = found.analysis.graphwise.logits
    assert logits is not None
    source = open_images(VAL, resolve_preprocess(DIGITS, config), limit=8)
    measured = evaluate(found.output / "quantized.onnx", source, reference=DIGITS, threads=1)
    assert measured.sqnr_db == pytest.approx(logits.snr_db, abs=2)
