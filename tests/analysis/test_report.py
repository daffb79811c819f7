"""The page: every op once, right numbers, everything escaped, nothing from outside."""

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sample_report import make_attention, make_ops, make_report

from ptq_onnx.report.attention_map import draw_attention
from ptq_onnx.report.page import number, render, size, verdict
from ptq_onnx.report.plots import snr_over_blocks

CHROMIUM = next((p for n in ("chromium", "google-chrome") if (p := shutil.which(n))), None)
EVIL = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Rows of the tables by id, as (class, cells, sort keys), and all addresses and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[tuple[str, list[str], list[str | None]]]] = {}
        self.links: list[str] = []
        self.scripts = 0
        self.text = ""
        self.table = ""
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        links = (v for k, v in attrs if k in ("src", "href", "xlink:href", "action"))
        self.links += [v or "" for v in links]
        self.scripts += tag == "script"
        if tag == "table":
            self.table = found.get("id") or ""
            self.rows[self.table] = []
        elif tag == "tr":
            self.rows[self.table].append((found.get("class") or "", [], []))
        elif tag == "td":
            self.rows[self.table][-1][1].append("")
            self.rows[self.table][-1][2].append(found.get("data-v"))
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag != "td"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cell:
            self.rows[self.table][-1][1][-1] += data

    def body(self, table: str) -> list[tuple[str, list[str], list[str | None]]]:
        return [row for row in self.rows[table] if row[1]]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attention") / "block_11.png"
    draw_attention(make_attention(3), path)
    return path


@pytest.fixture(scope="module")
def html(picture: Path) -> str:
    return render(make_report(), snr_over_blocks(make_ops()), [("Block 11", picture)])


def test_every_op_has_one_row_with_its_values(html: str) -> None:
    rows = Page(html).body("ops")
    ops = make_report()["analysis"]["ops"]
    assert len(rows) == len(ops) == 159
    for op, (_, cells, keys) in zip(ops, rows, strict=True):
        assert cells[3:5] == [op["role"], op["op_type"]]
        assert cells[2] == ("–" if op["block"] is None else str(op["block"]))
        assert float(keys[5] or "") == op["snr"]
        assert float(cells[5]) == pytest.approx(op["snr"], rel=1e-3)
        if op["snr_db"] is None:  # no error at all
            assert (op["snr"], cells[6], keys[6]) == (0, "exact", "1e999")
        else:
            assert float(cells[6]) == pytest.approx(op["snr_db"], abs=0.05)
        assert float(cells[7]) == pytest.approx(op["cosine"], abs=1e-6)
        assert float(keys[8] or "") == op["max_abs"]
        assert float(keys[9] or "") == op["mse"]
        assert cells[10:14] == [""] * 4  # not measured in the sample
        assert cells[14:] == ["yes" if op["quantized"] else "no", op["node"]]


def test_the_ten_worst_are_marked(html: str) -> None:
    ops = make_report()["analysis"]["ops"]
    expected = [op["node"] for op in sorted(ops, key=lambda op: -op["snr"])[:10]]
    marked = [(int(c[1]), c[-1]) for kind, c, _ in Page(html).body("ops") if "worst" in kind]
    assert [node for _, node in sorted(marked)] == expected
    assert [rank for rank, _ in sorted(marked)] == list(range(1, 11))


def test_tensors_show_scale_clip_and_exponents(html: str) -> None:
    report = make_report()
    rows = {cells[-1]: cells for _, cells, _ in Page(html).body("tensors")}
    assert len(rows) == len(report["tensors"])
    by_name = {t["tensor"]: t for t in report["tensors"]}
    norm = by_name["/blocks.3/norm1_output_0"]
    cells = rows[norm["tensor"]]
    assert float(cells[7]) == pytest.approx(norm["scale"], rel=1e-3)
    assert cells[8:12] == ["128", "-3.25", "4.5", "3"]
    counts = Counter(norm["alpha"]["values"])
    assert cells[12] == " ".join(f"{a}:{counts[a]}" for a in range(4))
    weight = by_name["blocks.0.fc1.weight"]
    low, high = number(min(weight["scale"])), number(max(weight["scale"]))
    assert rows["blocks.0.fc1.weight"][7] == f"{low}…{high} (768)"
    assert rows["blocks.0.fc1.weight"][8] == "0 (768)"
    assert rows["/blocks.0/softmax_output_0"][7] == "2^−code"


def test_summary_floats_and_reproduction(html: str) -> None:
    text = " ".join(Page(html).text.split())
    for part in (
        "75.40 → 74.20 %", "−1.20 points, 500 images", "21.4 dB", "22.9 MB → 5.9 MB",
        "3.88 times smaller", "lower is better", "higher is better", "Arithmetic: float",
        "bias: float here, int32 on integer hardware (48)", "blocks.3.fc2",
        "ptq-onnx quantize vit_tiny.onnx --config config.yaml --calib calib",
        "per_channel: - fc2@5,6", "images that calibration did not see",
        "1 calibration image could not be read",
    ):  # fmt: skip
        assert part in text, part
    assert "integer: LayerNorm" not in text
    other = render(make_report() | {"arithmetic": "integer"}, "", [])
    assert "integer: LayerNorm" in other
    assert "float between codes: " not in other


@pytest.mark.parametrize("source", ["arrays", "pictures", "a list of files"])
def test_the_command_names_no_images_that_are_no_path(source: str) -> None:
    report = make_report()
    report["calibration"]["source"] = source
    report["validation"] = {"source": source, "labels": None}
    text = " ".join(Page(render(report, "", [])).text.split())
    assert "--config config.yaml --calib calib" in text
    assert "--val" not in text.partition("--calib calib")[2][:40]


def test_an_integer_file_shows_widths_and_operations() -> None:
    integer = {
        "ops": {"MatMulInteger": 97, "BitShift": 312},
        "widest": {"accumulator": {"tensor": "t0", "bits": 24, "of": 32, "seen_bits": 19}},
        "operations": {"macs": 1234567, "look_ups": 89},
        "traffic": {
            "float_activations": 9_000_000,
            "float_weights": 1_000_000,
            "integer_activations": 2_000_000,
            "integer_weights": 500_000,
        },
    }
    report = make_report() | {"integer": integer, "config": {"target": "integer"}}
    html = render(report, "", [])
    text = " ".join(Page(html).text.split())
    for part in (
        "every op between the image's codes and the scale of the logits",
        "macs1234567 look ups89 memory traffic2.5 MB, float model 10.0 MB",
        "MatMulInteger 97, BitShift 312",
        "What has no codes of its own",
    ):
        assert part in text, part
    assert [cells for _, cells, _ in Page(html).body("widest")] == [
        ["accumulator", "24", "19", "32", "t0"]
    ]


def test_what_equalisation_moved_and_what_the_runtime_runs(picture: Path) -> None:
    move = {
        "tensor": "/blocks.0/norm1_output_0", "role": "norm1", "block": 0, "gain_db": 7.83,
        "into": "LayerNormalization", "largest": 4096.0, "copies": 3,
    }  # fmt: skip
    report = make_report() | {
        "equalization": {"forms": {"KeptRank": 1, "SplitHead": 0}, "moves": [move]},
        "optimised": {"MatMulIntegerToFloat": 49, "Conv": 0},
        "validation": {"source": "val", "labels": "val.txt"},
        "fusions": {"LayerNormalization": 25, "Silu": 0},
    }
    page = Page(render(report, "", []))
    text = " ".join(page.text.split())
    assert [cells for _, cells, _ in page.body("moves")] == [
        ["0", "norm1", "LayerNormalization", "7.8", "4096", "3", "/blocks.0/norm1_output_0"]
    ]
    for part in (
        "Forms rewritten: KeptRank 1.", "ONNX Runtime runsMatMulIntegerToFloat 49",
        "attention; for onnxruntime", "--calib calib --val val --labels val.txt",
        "FusedLayerNormalization 25 Calibrated",
    ):  # fmt: skip
        assert part in text, part
    plain = render(make_report(), "", [])
    assert "What equalisation moved" not in plain
    assert "--val" not in plain.split('id="command"')[1].split("</pre>")[0]


def test_columns_that_were_not_measured_are_hidden(html: str) -> None:
    assert '<table class="sortable graphwise" id="ops">' in html
    headings = re.findall(r'<th[^>]* data-t="([^"]*)"[^>]*>', html.split('id="ops"')[1])
    assert headings[12:14] == ["Layerwise dB", "Gain dB"]
    hidden = "#ops.graphwise :is(th, td):is(:nth-child(13), :nth-child(14)) { display: none; }"
    assert hidden in html


def test_nothing_comes_from_outside(html: str) -> None:
    page = Page(html)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html
    assert "fetch(" not in html
    assert page.scripts == 1
    assert "default-src 'none'" in html
    assert html.lstrip().startswith("<!DOCTYPE html>")
    assert "<?xml" not in html
    assert html.count("<!DOCTYPE") == 1


def test_text_from_files_is_escaped() -> None:
    report = make_report(1)
    report["tensors"][0]["tensor"] = EVIL
    report["analysis"]["ops"][1]["node"] = EVIL
    report["floats"][0] |= {"tensor": EVIL, "reason": EVIL}
    report["model"] |= {"path": EVIL, "producer": EVIL}
    report["notes"] = [EVIL]
    report["config"]["preprocess"] = EVIL
    page = Page(text := render(report, "", []))
    assert "<script>alert" not in text
    assert page.scripts == 1
    assert EVIL in [cells[-1] for _, cells, _ in page.body("tensors")]
    assert EVIL in [cells[-1] for _, cells, _ in page.body("ops")]


def test_twelve_pictures_fit(picture: Path) -> None:
    svg = snr_over_blocks(make_ops())
    text = render(make_report(), svg, [(f"Block {b}", picture) for b in range(12)])
    assert len(text.encode()) < 1_500_000
    assert text.count("<img ") == 12


@pytest.mark.parametrize("missing", ["accuracy", "fidelity", "analysis", "config", "sizes",
                                     "calibration", "cleaned", "preprocess", "notes"])  # fmt: skip
@pytest.mark.parametrize("how", ["none", "absent"])
def test_missing_parts_are_told_or_left_out(missing: str, how: str) -> None:
    report = make_report(1)
    report[missing] = None
    if how == "absent":
        del report[missing]
    page = Page(render(report, "", []))
    assert "None" not in page.text.replace("None.", "")
    assert ("needs --val and labels" in page.text) == (missing == "accuracy")
    assert ("Not analysed" in page.text) == (missing == "analysis")


def test_almost_empty_report() -> None:
    text = render({"blocks": 0}, "", [])
    assert "the quality of this model is not known" in text


def test_errors_without_number_are_the_worst() -> None:
    report = make_report(1)
    report["analysis"]["ops"][3]["snr"] = math.inf
    report["analysis"]["ops"][4] |= {"snr": None, "snr_db": None, "cosine": None}
    rows = Page(render(report, "", [])).body("ops")
    assert rows[3][1][1] in ("1", "2")
    assert rows[4][1][1] in ("1", "2")
    assert rows[3][1][5] == "∞"
    assert rows[4][1][5] == ""


@pytest.mark.parametrize(
    ("after", "grade", "words"),
    [(75.0, "good", "holds"), (73.0, "fair", "Some"), (70.0, "bad", "Too much")],
)
def test_verdict_on_accuracy(after: float, grade: str, words: str) -> None:
    report = make_report(1)
    report["accuracy"]["quantized"]["top1"] = after
    got, text = verdict(report)
    assert got == grade
    assert words in text
    assert f"75.40 % → {after:.2f} % on 500 images (one image is 0.2 points)" in text


def test_verdict_without_labels() -> None:
    report = make_report(1) | {"accuracy": None}
    assert verdict(report)[0] == "fair"
    assert "93.6 % of 500 images without labels" in verdict(report)[1]
    report["fidelity"] = None
    report["analysis"]["blocks"][-1]["snr_db"] = 28.8
    assert verdict(report) == (
        "good",
        "The error of the last block is small, 28.8 dB. Accuracy was not measured:"
        " give --val, and --labels, to know it.",
    )


def test_numbers() -> None:
    assert [number(v) for v in (None, 0, 3, 3.0, 0.00012345, 1e9, math.inf)] == [
        "", "0", "3", "3", "0.0001234", "1e+09", "∞",
    ]  # fmt: skip
    assert [size(v) for v in (400, 22_900_000)] == ["0.4 kB", "22.9 MB"]


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, str]]:
    """Opens a page in a browser without a window: (its document, the browser's log)."""
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    folder = tmp_path_factory.mktemp("browser")

    def run(text: str) -> tuple[str, str]:
        (folder / "page.html").write_text(text, encoding="utf-8")
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
            "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
            (folder / "page.html").as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, done.stderr

    return run


PROBE = """<script>
const seen = {};
const column = (t, n) => [...document.getElementById(t).tBodies[0].rows]
  .map((r) => r.cells[n].dataset.v ?? r.cells[n].textContent);
const click = (t, n) => document.querySelectorAll(`#${t} th button`)[n].click();
click("ops", 5); seen.up = column("ops", 5).map(Number);
click("ops", 5); seen.down = column("ops", 5).map(Number);
seen.sorted = document.querySelectorAll("#ops th")[5].getAttribute("aria-sort");
click("ops", 3); seen.roles = column("ops", 3);
click("ops", 0); seen.order = column("ops", 0).map(Number);
click("tensors", 11); seen.k = column("tensors", 11);
document.getElementById("only-worst").click();
seen.worst = document.querySelectorAll("#ops tbody tr:not([hidden])").length;
document.getElementById("only-worst").click();
const box = document.querySelector("input[data-table=ops]");
box.value = "softmax"; box.dispatchEvent(new Event("input"));
seen.softmax = document.querySelectorAll("#ops tbody tr:not([hidden])").length;
document.body.innerHTML = "";
const out = document.createElement("pre");
out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
</script>"""


def test_tables_sort_and_filter_in_a_browser(
    html: str, browse: Callable[[str], tuple[str, str]]
) -> None:
    document, log = browse(html.replace("</body>", PROBE + "</body>"))
    found = re.search(r'<pre id="seen">(.*?)</pre>', document, re.DOTALL)
    assert found is not None, log
    seen: dict[str, Any] = json.loads(found.group(1))
    ratios = sorted(op.snr for op in make_ops())
    assert seen["up"] == ratios
    assert seen["down"] == ratios[::-1]
    assert seen["sorted"] == "descending"
    assert seen["roles"] == sorted(seen["roles"])
    assert seen["order"] == list(range(159))
    filled = [k for k in seen["k"] if k]
    assert [float(k) for k in filled] == sorted(map(float, filled))
    assert seen["k"][: len(filled)] == filled  # rows without a value come last
    assert seen["worst"] == 10
    assert seen["softmax"] == 12


def test_console_stays_silent(html: str, browse: Callable[[str], tuple[str, str]]) -> None:
    for text in (html, render({"blocks": 0}, "", [])):
        _, log = browse(text)
        assert "CONSOLE" not in log, log
    _, log = browse(html.replace("</body>", "<script>nowhere()</script></body>"))
    assert "CONSOLE" in log  # the check itself can fail
