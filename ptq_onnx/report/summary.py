"""How a run went, in a line and a few figures: the top of the page."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptq_onnx.config.names import RUNTIMES
from ptq_onnx.report.page_text import decibel_text, metric_text, number, size, truth_text
from ptq_onnx.report.reproduce import following

Entry = Mapping[str, Any]

GOOD_DB, FAIR_DB = 20, 12
"""SQNR from which on an error is small, or noticeable."""
HOLDS = "The accuracy holds"


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


def _by_metric(found: Entry) -> tuple[str, str]:
    """By what was asked for: points of percent, or percent of what the float model has, where that
    is more than nothing."""
    lost = found["float_value"] - found["value"]
    lost = lost if found["higher"] else -lost
    if found["unit"] != "%":
        base = abs(found["float_value"])
        lost *= 100 / (base if base > abs(found["value"]) / 100 else 1)
    grade = "good" if lost <= 1 else "fair" if lost <= 3 else "bad"
    word = {"good": "holds", "fair": "is a little worse", "bad": "is much worse"}[grade]
    before, after = (metric_text(found[k], found["unit"]) for k in ("float_value", "value"))
    return grade, (
        f"The metric {word}: {found['figure']} {before} → {after} on {found['images']} images"
        f" ({truth_text(found['targets'])})."
    )


def _measured(report: Entry) -> tuple[str, str]:
    metric = report.get("metric")
    if metric is not None and metric.get("float_value") is not None:
        return _by_metric(metric)
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


def two_figures(report: Entry) -> str | None:
    """Why the SQNR of the file and that of the simulation differ; None where one is missing."""
    fidelity, analysis = report.get("fidelity") or {}, report.get("analysis") or {}
    file, simulated = fidelity.get("sqnr_db"), analysis.get("logits")
    if file is None or simulated is None or len(fidelity.get("outputs") or []) > 1:
        return None
    own, count = _images(fidelity), analysis["images"]
    if fidelity.get("source") == "val":
        own = f"all {fidelity['images']} images of --val"
    same = fidelity.get("source") != "val" and fidelity["images"] == count
    differ = []
    if not same:
        differ.append(
            "the images are others, and the sums go over all of them, so that a few hard ones"
            " weigh much"
        )
    if arithmetic_of(report) != "integer file":
        differ.append(
            "rounding is chaotic: the runtime's kernels add in another order, and a last bit that"
            " differs tips values over the edge between two codes"
        )
    there = "on the same images" if same else f"on {count} images"
    ours, theirs = (
        decibel_text(file, None, 1, " dB"),
        decibel_text(simulated["snr_db"], simulated["snr"], 1, " dB"),
    )
    word = "They differ" if ours != theirs else "They need not agree as here,"
    return (
        f"Why two figures: the card on top, {ours}, is that of the written file in its runtime on"
        f" {own}; {theirs} is that of the simulation {there}, which can look into every op."
        + (f" {word} because {', and because '.join(differ)}." if differ else "")
        + " What counts is the file's."
    )


def _images(fidelity: Entry) -> str:
    """Which images, in words."""
    words = {
        "held apart": "images held out from calibration",
        "calibration": "images that calibration used too",
        "noise": "images of Gaussian noise",
    }
    return f"{fidelity['images']} {words.get(str(fidelity.get('source')), 'images without labels')}"


def _ascending(value: float | None) -> float:
    return math.inf if value is None else value


def _top1(accuracy: Entry) -> float | None:
    if accuracy["float"].get("top1") is None or not accuracy.get("count"):
        return None
    found: float | None = accuracy["quantized"].get("top1")
    return found


def cards(report: Entry) -> list[tuple[str, str, str]]:
    """Title, figure and small print of the boxes on top."""
    config = report.get("config") or {}
    found: list[tuple[str, str, str]] = []
    accuracy, fidelity = report.get("accuracy"), report.get("fidelity")
    metric = report.get("metric")
    if metric is not None:
        found.append(_metric_card(metric))
    if accuracy is not None:
        before, after = accuracy["float"], accuracy["quantized"]
        for key, title in (("top1", "Top-1"), ("top5", "Top-5")):
            if before.get(key) is not None and after.get(key) is not None:
                change = after[key] - before[key]
                text = f"{before[key]:.2f} → {after[key]:.2f} %"
                small = f"{change:+.2f} points, {accuracy['count']} images".replace("-", "−")
                found.append((title, text, small))
    elif metric is None and (fidelity is None or fidelity.get("agreement") is not None):
        found.append(("Accuracy", "not measured", "needs --val and labels"))
    close = fidelity or (accuracy or {}).get("quantized") or {}
    if close.get("sqnr_db") is not None:
        title, images = _sqnr_title(fidelity), "" if fidelity is None else _images(fidelity)
        small = images if fidelity and fidelity.get("source") not in (None, "val") else ""
        small = f"higher is better; {small}" if small else "higher is better"
        found.append((title, decibel_text(close["sqnr_db"], None, 1, " dB"), small))
    if close.get("agreement") is not None:
        found.append(("Same top class", f"{close['agreement']:.1f} %", "as the float model"))
    sizes = report.get("sizes") or {}
    if sizes.get("float") and sizes.get("quantized"):
        ratio = f"{sizes['float'] / sizes['quantized']:.2f} times smaller"
        text = f"{size(sizes['float'])} → {size(sizes['quantized'])}"
        found.append(("File", text, ratio))
    covered = report.get("coverage") or {}
    if covered:
        kinds = (("linears", "linears"), ("convolutions", "convolutions"),
                 ("attention", "attention products"))  # fmt: skip
        parts = [f"{covered[key]['integer']} of {covered[key]['all']} {name}"
                 for key, name in kinds if covered[key]["all"]]  # fmt: skip
        found.append(
            ("MACs in integers", f"{covered['percent']:.1f} %", ", ".join(parts) or "no products")
        )
    if config and (config.get("target") or "onnxruntime") in RUNTIMES:
        names = [Path(word).name for word in shlex.split(following(report).get("speed", ""))]
        small = " ".join(("needs", *names)) if names else "needs the file, which quantize writes"
        found.append(("Speed-up", "not measured", small))
    if config:
        bits = f"bits {config.get('bits')}: weights, activations, attention"
        if config.get("target"):
            bits += f"; for {config['target']}"
        found.append(("Quantizer", str(config.get("quantizer")), bits))
    return found


def _metric_card(found: Entry) -> tuple[str, str, str]:
    before, after = (metric_text(found[k], found["unit"]) for k in ("float_value", "value"))
    others = [
        f"{name} {number(value)}"
        for name, value in found["figures"].items()
        if name != found["figure"]
    ]
    better = "higher" if found["higher"] else "lower"
    small = [f"{better} is better", truth_text(found["targets"]), *others]
    return str(found["figure"]), f"{before} → {after}", "; ".join(small)


def _sqnr_title(fidelity: Entry | None) -> str:
    """What the SQNR is of."""
    found = (fidelity or {}).get("outputs") or []
    if len(found) > 1:
        return f"SQNR, worst of {len(found)} outputs"
    logits = not found or found[0]["agreement"] is not None
    return "SQNR of the logits" if logits else f"SQNR of {found[0]['name']}"


def arithmetic_of(report: Entry) -> str:
    """How LayerNorm and softmax are computed, in a word or two; empty where the report does not
    say."""
    if (report.get("config") or {}).get("target") == "integer":
        return "integer file"
    return str(report.get("arithmetic") or "")
