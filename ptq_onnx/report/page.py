"""The report as one self-contained page: what was done to every tensor and what it cost.

Takes the dictionary that report.json holds. Parts that were not measured are None or
absent; the page says so instead of failing.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup
from PIL import Image

from ptq_onnx.numerics.codes.by_name import code_named
from ptq_onnx.numerics.multiples import ROWS
from ptq_onnx.report.attention_page import Sheet
from ptq_onnx.report.page_text import number, size
from ptq_onnx.report.reproduce import command, in_python, typed
from ptq_onnx.report.sections import by_place, sections
from ptq_onnx.report.suggestions import place, suggestions
from ptq_onnx.report.summary import arithmetic_of, cards, two_figures, verdict, warning
from ptq_onnx.report.templates import template

__all__ = ["number", "render", "size", "verdict"]

Entry = Mapping[str, Any]

WORST = 10
"""Ops that the page marks as the worst."""
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
    report: Entry,
    svg: str,
    pictures: Sequence[tuple[str, Path]],
    picture: Path | None = None,
    *,
    narrow: str = "",
    sheets: Sequence[Sheet] = (),
) -> str:
    """The HTML page. ``svg``: the figure of error over blocks, trusted, inlined as it is;
    ``narrow``: the same for a phone.

    ``pictures``: caption and file of pictures to show; ``sheets``: attention maps; ``picture``:
    that of the image itself, to stand beside its rollout. They are embedded. The page asks for
    nothing from outside. All other text is escaped.
    """
    analysis = report.get("analysis")
    judged = verdict(report)
    parts = sections(report)
    tensors = [_tensor(t) for t in report.get("tensors") or []]
    links = _links(tensors, parts["variation"])
    ops = _ops((analysis or {}).get("ops") or [], (analysis or {}).get("sensitivity"))
    ops = [{**op, "link": links.get(op.get("tensor", ""))} for op in ops]
    by_itself = {t["tensor"]: t for t in (parts["variation"] or {}).get("tensors") or []}
    worst = sorted((op for op in ops if op["rank"]), key=lambda op: op["rank"])
    return template("report.html").render(
        report=report,
        model=report.get("model") or {},
        config=report.get("config") or {},
        calibration=report.get("calibration") or {},
        arithmetic=ARITHMETIC.get(arithmetic_of(report), "not stated"),
        verdict=judged,
        warning=warning(report),
        outputs=_outputs(report.get("fidelity")),
        cards=cards(report),
        svg=Markup(svg[max(svg.find("<svg"), 0) :]),
        narrow=Markup(narrow),
        analysis=analysis,
        ops=ops,
        worst=[
            {**op, "place": place(op), "own": by_itself.get(op.get("tensor", ""))} for op in worst
        ],
        links=links,
        suggestions=suggestions(report, judged[0]),
        figures=two_figures(report),
        moves=(report.get("equalization") or {}).get("moves") or [],
        **parts,
        tensors=tensors,
        floats=_by_reason(report.get("floats") or []),
        pictures=[(caption, _embedded(path)) for caption, path in pictures],
        sheets=sheets,
        picture=None if picture is None else _embedded(picture),
        yaml=yaml.safe_dump(dict(report.get("config") or {}), sort_keys=False),
        command=typed(command(report)),
        in_python=in_python(report),
    )


def _links(tensors: Sequence[Entry], variation: Entry | None) -> dict[str, dict[str, Any]]:
    """By name of a tensor, the ``row`` of the page that says what is known of it, and the
    ``place`` of its histogram."""
    found: dict[str, dict[str, Any]] = {}
    for index, one in enumerate((variation or {}).get("tensors") or []):
        found[one["tensor"]] = {"row": f"varied-{index}", "place": index}
    for index, one in enumerate(tensors):
        found[one["tensor"]] = {**found.get(one["tensor"], {}), "row": f"tensor-{index}"}
    return found


def _outputs(fidelity: Entry | None) -> list[Entry]:
    """The rows of the table of outputs: none where one says it all."""
    found = list((fidelity or {}).get("outputs") or [])
    return found if len(found) > 1 else []


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
    elif entry.get("order") is not None:
        channels = f"blocks of {ROWS} rows"
    fixed = code_named(entry.get("code", "uniform")).fixed
    return {
        **entry,
        "numbers": f"{'int' if entry.get('signed') else 'uint'}"
        f" {'sym.' if entry.get('symmetric') else 'asym.'}",
        "scale_text": _spread(entry.get("scale")) if fixed is None else fixed,
        "scale_value": None if fixed else _largest(entry.get("scale")),
        "zero_text": "" if fixed else _spread(entry.get("zero_point")),
        "zero_value": None if fixed else _largest(entry.get("zero_point")),
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
