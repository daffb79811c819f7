"""The report as one self-contained page: what was done to every tensor and what it cost.

Takes the dictionary that report.json holds. Parts that were not measured are None or
absent; the page says so instead of failing.
"""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, Template
from markupsafe import Markup
from PIL import Image

from ptq_onnx.evaluation.outputs import MOST_DB
from ptq_onnx.files.file_names import for_page
from ptq_onnx.report.sections import by_place, sections

Entry = Mapping[str, Any]

GOOD_DB, FAIR_DB = 20, 12
"""SQNR from which on an error is small, or noticeable."""
HOLDS = "The accuracy holds"
WORST = 10
"""Ops that the page marks as the worst."""
EXACT = "exact"
"""What stands for infinite dB."""
IN_PYTHON = ("arrays", "pictures", "a list of files")
"""Sources of images that no option can name."""
EMBEDDED_BYTES = 90_000
"""Larger pictures go into the page as WebP, so that twelve of them fit in about 1 MB."""

ARITHMETIC = {
    "float": (
        "float between codes: LayerNorm, softmax and GELU compute in float on dequantized"
        " values, as the runtime of the quantized file does"
    ),
    "integer": (
        "integer: LayerNorm and softmax compute in integers in the error analysis below;"
        " the written file computes them in float between codes"
    ),
    "integer file": (
        "integer: every op between the image's codes and the scale of the logits computes in"
        " integers, in the written file and, to the bit, in the error analysis below"
    ),
}


def render(
    report: Entry, svg: str, pictures: Sequence[tuple[str, Path]], picture: Path | None = None
) -> str:
    """The HTML page. ``svg``: the figure of error over blocks, trusted, inlined as it is.

    ``pictures``: caption and file of each attention map; ``picture``: that of the image itself,
    to stand beside its rollout. They are embedded. The page asks for nothing from outside. All
    other text is escaped.
    """
    analysis = report.get("analysis")
    return _page().render(
        report=report,
        model=report.get("model") or {},
        config=report.get("config") or {},
        calibration=report.get("calibration") or {},
        arithmetic=ARITHMETIC.get(_arithmetic(report), "not stated"),
        verdict=verdict(report),
        warning=warning(report),
        outputs=_outputs(report.get("fidelity")),
        cards=_cards(report),
        svg=Markup(svg[max(svg.find("<svg"), 0) :]),
        analysis=analysis,
        ops=_ops((analysis or {}).get("ops") or [], (analysis or {}).get("sensitivity")),
        advice=(analysis or {}).get("advice") or [],
        moves=(report.get("equalization") or {}).get("moves") or [],
        **sections(report),
        tensors=[_tensor(t) for t in report.get("tensors") or []],
        floats=_by_reason(report.get("floats") or []),
        pictures=[(caption, _embedded(path)) for caption, path in pictures],
        picture=None if picture is None else _embedded(picture),
        yaml=yaml.safe_dump(dict(report.get("config") or {}), sort_keys=False),
        command=_command(report),
    )


@cache
def _page() -> Template:
    """The template, read once in a process."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=for_page,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, size=size, cell=cell, counts=counts, decibels=decibel_text
    )
    return environment.get_template("report.html")


def _arithmetic(report: Entry) -> str:
    if (report.get("config") or {}).get("target") == "integer":
        return "integer file"
    return str(report.get("arithmetic") or "")


def warning(report: Entry) -> str | None:
    """What may make every figure of the page worthless."""
    found: str | None = (report.get("preprocess_check") or {}).get("warning")
    return found


def verdict(report: Entry) -> tuple[str, str]:
    """A word for the colour (good, fair, bad, none) and one line that says how it went.

    Nothing is good where the pictures may not reach the model as it was trained.
    """
    grade, text = _measured(report)
    if warning(report) is None:
        return grade, text
    if text.startswith(HOLDS):
        text = f"Quantization costs little{text[len(HOLDS) :]}"
    first = "The float model itself may be off, see the warning. "
    return ("bad" if grade == "bad" else "fair"), first + text


def _measured(report: Entry) -> tuple[str, str]:
    accuracy, fidelity = report.get("accuracy"), report.get("fidelity")
    outputs = (fidelity or {}).get("outputs") or []
    if accuracy is not None and _top1(accuracy) is not None:
        before, after = accuracy["float"]["top1"], accuracy["quantized"]["top1"]
        lost, count = before - after, accuracy["count"]
        grade = "good" if lost <= 1 else "fair" if lost <= 3 else "bad"
        word = {
            "good": HOLDS,
            "fair": "Some accuracy is lost",
            "bad": "Too much accuracy is lost",
        }[grade]
        text = f"{word}: top-1 {before:.2f} % → {after:.2f} % on {count} images"
        where = f" (output '{accuracy['output']}')" if len(outputs) > 1 else ""
        return grade, f"{text}{where} (one image is {100 / count:.2g} points)."
    if fidelity is not None and fidelity.get("agreement") is not None:
        same = fidelity["agreement"]
        grade = "good" if same >= 98 else "fair" if same >= 93 else "bad"
        word = {"good": "close to", "fair": "near", "bad": "far from"}[grade]
        return grade, (
            f"The quantized file is {word} the float model: the same top class on {same:.1f} %"
            f" of {_images(fidelity)}. Accuracy was not measured."
        )
    if fidelity is not None and fidelity.get("sqnr_db") is not None:
        decibels = fidelity["sqnr_db"]
        grade = "good" if decibels >= GOOD_DB else "fair" if decibels >= FAIR_DB else "bad"
        word = {"good": "close to", "fair": "near", "bad": "far from"}[grade]
        worst = min(outputs, key=lambda one: _ascending(one["sqnr_db"]), default=None)
        where = f", at '{worst['name']}', the worst output," if worst and len(outputs) > 1 else ""
        return grade, (
            f"The quantized file is {word} the float model: {decibels:.1f} dB SQNR{where} on"
            f" {_images(fidelity)}. No output is [batch, classes]: there is no accuracy to measure."
        )
    blocks = (report.get("analysis") or {}).get("blocks") or []
    if blocks:
        found = blocks[-1]["snr_db"]
        last = math.inf if found is None else found
        grade = "good" if last >= GOOD_DB else "fair" if last >= FAIR_DB else "bad"
        word = {"good": "small", "fair": "noticeable", "bad": "large"}[grade]
        return grade, (
            f"The error of the last block is {word}, {decibel_text(last, None, 1, ' dB')}."
            " Accuracy was not measured: give --val, and --labels, to know it."
        )
    return "none", "Nothing was measured on images: the quality of this model is not known."


def _images(fidelity: Entry) -> str:
    """Which images, in words."""
    words = {
        "held apart": "images held apart from calibration",
        "calibration": "images that calibration used too",
    }
    return f"{fidelity['images']} {words.get(str(fidelity.get('source')), 'images without labels')}"


def _ascending(value: float | None) -> float:
    return math.inf if value is None else value


def _outputs(fidelity: Entry | None) -> list[Entry]:
    """The rows of the table of outputs: none where one says it all."""
    found = list((fidelity or {}).get("outputs") or [])
    return found if len(found) > 1 else []


def _top1(accuracy: Entry) -> float | None:
    if accuracy["float"].get("top1") is None or not accuracy.get("count"):
        return None
    found: float | None = accuracy["quantized"].get("top1")
    return found


def _cards(report: Entry) -> list[tuple[str, str, str]]:
    """Title, figure and small print of the boxes on top."""
    config = report.get("config") or {}
    cards: list[tuple[str, str, str]] = []
    accuracy, fidelity = report.get("accuracy"), report.get("fidelity")
    if accuracy is not None:
        before, after = accuracy["float"], accuracy["quantized"]
        for key, title in (("top1", "Top-1"), ("top5", "Top-5")):
            if before.get(key) is not None and after.get(key) is not None:
                change = after[key] - before[key]
                text = f"{before[key]:.2f} → {after[key]:.2f} %"
                small = f"{change:+.2f} points, {accuracy['count']} images".replace("-", "−")
                cards.append((title, text, small))
    elif fidelity is None or fidelity.get("agreement") is not None:
        cards.append(("Accuracy", "not measured", "needs --val and labels"))
    close = fidelity or (accuracy or {}).get("quantized") or {}
    if close.get("sqnr_db") is not None:
        title, images = _sqnr_title(fidelity), "" if fidelity is None else _images(fidelity)
        small = images if fidelity and fidelity.get("source") not in (None, "val") else ""
        small = f"higher is better; {small}" if small else "higher is better"
        cards.append((title, decibel_text(close["sqnr_db"], None, 1, " dB"), small))
    if close.get("agreement") is not None:
        cards.append(("Same top class", f"{close['agreement']:.1f} %", "as the float model"))
    sizes = report.get("sizes") or {}
    if sizes.get("float") and sizes.get("quantized"):
        ratio = f"{sizes['float'] / sizes['quantized']:.2f} times smaller"
        text = f"{size(sizes['float'])} → {size(sizes['quantized'])}"
        cards.append(("File", text, ratio))
    if config:
        bits = f"bits {config.get('bits')}: weights, activations, attention"
        if config.get("target"):
            bits += f"; for {config['target']}"
        cards.append(("Quantizer", str(config.get("quantizer")), bits))
    return cards


def _sqnr_title(fidelity: Entry | None) -> str:
    """What the SQNR is of."""
    found = (fidelity or {}).get("outputs") or []
    if len(found) > 1:
        return f"SQNR, worst of {len(found)} outputs"
    logits = not found or found[0]["agreement"] is not None
    return "SQNR of the logits" if logits else f"SQNR of {found[0]['name']}"


def _ops(ops: Sequence[Entry], sensitivity: Entry | None) -> list[dict[str, Any]]:
    """The ops in graph order, each with ``rank``: 1…10 for the worst, else None, and with what
    its module costs by itself and gives back."""
    alone, gains = ({} if sensitivity is None else by_place(sensitivity, key) for key in
                    ("layerwise", "leave_one_out"))  # fmt: skip
    noisy = [i for i, op in enumerate(ops) if _order(op["snr"]) > 0]
    worst = sorted(noisy, key=lambda i: -_order(ops[i]["snr"]))[:WORST]
    rank = {index: place for place, index in enumerate(worst, start=1)}
    return [
        {
            **op,
            "index": i,
            "rank": rank.get(i),
            "layerwise": alone.get((op["role"], op["block"])),
            "gain": gains.get((op["role"], op["block"])),
        }
        for i, op in enumerate(ops)
    ]


def _order(snr: float | None) -> float:
    """What to sort an error by; an error without a number is the worst."""
    return math.inf if snr is None or math.isnan(snr) else snr


def _tensor(entry: Entry) -> dict[str, Any]:
    """One row of the table of tensors, ready to print."""
    alpha, factor = entry.get("alpha"), entry.get("factor")
    values: Sequence[Any] = () if alpha is None else alpha["values"]
    counts = Counter(values)
    channels = ""
    if alpha is not None:
        channels = " ".join(f"{a}:{n}" for a, n in sorted(counts.items()))
    elif factor is not None:
        channels = f"factor {_spread(factor['values'])}"
    log2 = entry.get("code") == "log2"
    return {
        **entry,
        "numbers": f"{'int' if entry.get('signed') else 'uint'}"
        f" {'sym.' if entry.get('symmetric') else 'asym.'}",
        "scale_text": "2^−code" if log2 else _spread(entry.get("scale")),
        "scale_value": None if log2 else _largest(entry.get("scale")),
        "zero_text": "" if log2 else _spread(entry.get("zero_point")),
        "zero_value": None if log2 else _largest(entry.get("zero_point")),
        "k": max(values, default=None),
        "channels": channels,
    }


def _spread(values: Any) -> str:
    """A number, or smallest…largest and the count of several, as in ``0.001…0.02 (192)``."""
    if not isinstance(values, list):
        return number(values)
    flat = _flat(values)
    if not flat:
        return ""
    low, high = number(min(flat)), number(max(flat))
    text = low if low == high else f"{low}…{high}"
    return f"{text} ({len(flat)})" if len(flat) > 1 else text


def _largest(values: Any) -> float | None:
    flat = _flat(values) if isinstance(values, list) else [values]
    return max((v for v in flat if v is not None), default=None)


def _flat(values: list[Any]) -> list[Any]:
    return [v for part in values for v in (_flat(part) if isinstance(part, list) else [part])]


def _by_reason(floats: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """The tensors that stay in float, by reason, in the order of the reasons."""
    found: dict[str, list[Entry]] = {}
    for entry in floats:
        found.setdefault(str(entry["reason"]), []).append(entry)
    return list(found.items())


def _command(report: Entry) -> str:
    """The command line that repeats the run with the config.yaml beside the report."""
    calibration = report.get("calibration") or {}
    model = (report.get("model") or {}).get("path") or "model.onnx"
    parts = ["ptq-onnx", "quantize", str(model), "--config", "config.yaml"]
    if calibration.get("images") == 0:
        parts += ["--scales", "report.json"]
    else:
        source = calibration.get("source")
        parts += ["--calib", "calib" if source is None or source in IN_PYTHON else str(source)]
    measured = report.get("validation") or {}
    if measured.get("source") not in (None, *IN_PYTHON):
        parts += ["--val", str(measured["source"])]
        parts += ["--labels", str(measured["labels"])] if measured.get("labels") else []
    return shlex.join(parts)


def _embedded(path: Path) -> str:
    """A data address of the picture; WebP where the file is large and that is smaller."""
    data, kind = path.read_bytes(), "png"
    if len(data) > EMBEDDED_BYTES:
        buffer = io.BytesIO()
        with Image.open(path) as picture:
            picture.convert("RGB").save(buffer, "webp", quality=70, method=4)
        if buffer.tell() < len(data):
            data, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def number(value: Any) -> str:
    """Four significant digits; whole numbers as they are; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and value < 1e6):
        return str(int(value))
    return f"{value:.4g}" if math.isfinite(value) else "∞" if value == math.inf else str(value)


def decibel_text(value: float | None, ratio: float | None, digits: int = 1, unit: str = "") -> str:
    """dB as text: ``exact`` without any error, which JSON holds as null beside a ratio of 0."""
    if value is None:
        return EXACT if ratio == 0 else ""
    return f"{value:.{digits}f}{unit}" if value < MOST_DB else EXACT


def cell(value: Any) -> str:
    """What a column sorts by: the number in full, or nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return "1e999" if value == math.inf else repr(float(value))


def counts(found: Mapping[str, int]) -> str:
    """``MatMul 49, Add 12``; what occurs never is left out."""
    return ", ".join(f"{name} {count}" for name, count in found.items() if count)


def size(count: int) -> str:
    """Bytes in kB or MB (powers of ten)."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
