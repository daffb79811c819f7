"""The parts of the page that have charts: sensitivity, variation, attention.

Everything is drawn from what report.json holds, so that every number on the page is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from ptq_onnx.analysis.attention_results import BlockAttention
from ptq_onnx.analysis.modules import KINDS
from ptq_onnx.analysis.variation_results import ChannelRanges
from ptq_onnx.files.file_names import printable
from ptq_onnx.report.mixed_section import mixed_section
from ptq_onnx.report.svg import (
    MAP_SHARE,
    WIDTH,
    attention_levels,
    box_plot,
    channel_bands,
    heat_map,
    rollout_maps,
)

Entry = Mapping[str, Any]

BANDS = 4
"""LayerNorm inputs whose channels are drawn one by one."""
HEAT_RANGE = (0.0, 40.0)
"""dB from which a cell is red, and from which it is green."""


def sections(report: Entry) -> dict[str, Any]:
    """What the template needs of each part; None for parts that were not measured."""
    analysis = report.get("analysis") or {}
    blocks = int(report.get("blocks") or 0)
    chosen = (report.get("config") or {}).get("attention_blocks") or []
    return {
        "sensitivity": _sensitivity(analysis.get("sensitivity"), blocks),
        "variation": _variation(
            analysis.get("variation"), {t["tensor"]: t for t in report.get("tensors") or []}
        ),
        "mixed": mixed_section(report.get("mixed")),
        "attention": _attention(analysis.get("attention"), chosen),
    }


def by_place(sensitivity: Entry, analysis: str) -> dict[tuple[str, int | None], float]:
    """By role and block of single ops: layerwise dB, or the gain of leave-one-out.

    The gain is that of the features, which are many numbers, where the model has them.
    """

    def figure(entry: Entry) -> float:
        """Infinite where JSON has null: nothing is left of the error."""
        if analysis == "layerwise":
            found = entry["error"]["snr_db"]
        else:
            found = entry["gain_db" if entry["features_snr"] is None else "features_gain_db"]
        return math.inf if found is None else float(found)

    return {
        (m["role"], m["block"]): figure(m)
        for m in sensitivity[analysis]
        if m["scope"] == "op" and m["part"] == "all"
    }


def _sensitivity(found: Entry | None, blocks: int) -> dict[str, Any] | None:
    if found is None:
        return None
    layerwise, gains = by_place(found, "layerwise"), by_place(found, "leave_one_out")
    order = [role for roles in KINDS.values() for role in roles]
    roles = sorted(
        {role for role, block in layerwise if block is not None},
        key=lambda r: order.index(r) if r in order else len(order),
    )
    cells = {(r, b): v for (r, b), v in layerwise.items() if b is not None}
    given = {(r, b): v for (r, b), v in gains.items() if b is not None}
    finite = [abs(v) for v in given.values() if math.isfinite(v)]
    digits = 1 if max(finite, default=0) >= 1 else 2
    left = {(m["module"], m["scope"], m["part"]): m for m in found["leave_one_out"]}
    rows = [
        {**m, "left": left.get((m["module"], m["scope"], m["part"]))} for m in found["layerwise"]
    ]
    return {
        **found,
        "on_all": sum(m["images"] == found["images"] for m in found["layerwise"]),
        "rows": rows,
        "heat": Markup(heat_map(cells, roles, blocks, "Layerwise dB", HEAT_RANGE)),
        "gains": Markup(
            heat_map(
                given,
                roles,
                blocks,
                "Gain of leave-one-out",
                text=lambda v: f"{round(v, digits) + 0.0:.{digits}f}" if math.isfinite(v) else "∞",
                bad_is_high=True,  # what gives much back costs much
            )
        ),
    }


def _told(entry: Entry, spec: Entry | None) -> str:
    """How a tensor is coded, in words."""
    if spec is None:
        return f"{entry['tensor']}: stays in float"
    own = entry["snr_db"]
    noise = "" if own is None else f", {own:.1f} dB by itself"
    scales = spec["scale"] if isinstance(spec["scale"], list) else [spec["scale"]]
    flat = np.ravel(np.array(scales, float))
    scale = f"{flat.min():.4g}" + ("" if flat.size == 1 else f"…{flat.max():.4g} ({flat.size})")
    scale = "2^−code" if spec["code"] == "log2" else scale
    return (
        f"{entry['tensor']}: {spec['bits']} bits, {spec['code']}, a scale per"
        f" {spec['granularity']}, scale {scale}{noise}"
    )


def _variation(found: Entry | None, specs: Mapping[str, Entry]) -> dict[str, Any] | None:
    if found is None:
        return None
    rows = {name: f"tensor-{index}" for index, name in enumerate(specs)}
    norms = [_ranges(n) for n in found["norm_inputs"]]
    wide = sorted(norms, key=_ratio, reverse=True)[:BANDS]
    tensors = sorted(
        found["tensors"], key=lambda t: math.inf if t["snr_db"] is None else t["snr_db"]
    )
    histograms = [
        {
            "low": t["histogram"]["low"],
            "high": t["histogram"]["high"],
            "f": t["histogram"]["float_counts"],
            "q": t["histogram"]["quantized_counts"],
            "clip": t["clip"],
            "of": t["clip_of"],
            "name": printable(_label(t)),
            "told": printable(_told(t, specs.get(t["tensor"]))),
            "row": rows.get(t["tensor"], f"varied-{index}"),
        }
        for index, t in enumerate(tensors)
    ]
    return {
        **found,
        "tensors": [{**t, "label": _label(t)} for t in tensors],
        "box": Markup(box_plot(norms)),
        "narrow_box": Markup(box_plot(norms, WIDTH)),
        "bands": [
            {"reader": n.reader, "box": n.box, "ratio": _ratio(n), "svg": Markup(channel_bands(n))}
            for n in wide
        ],
        # No "<" of a name can close the script element.
        "histograms": Markup(json.dumps(histograms, separators=(",", ":")).replace("<", "\\u003c")),
    }


def _ranges(entry: Entry) -> ChannelRanges:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    return ChannelRanges(**values)


def _ratio(found: ChannelRanges) -> float:
    return found.box[4] / found.box[2] if found.box[2] > 0 else 0.0


def _label(entry: Entry) -> str:
    block = entry["block"]
    return str(entry["role"]) if block is None else f"blocks.{block}.{entry['role']}"


def _coarse(codes: list[Entry]) -> Entry:
    """Four uniform bits."""
    return next(c for c in codes if (c["code"], c["bits"]) == ("uniform", 4))


def _attention(found: Entry | None, chosen: list[int]) -> dict[str, Any] | None:
    if found is None:
        return None
    blocks = found["blocks"]
    if not chosen and blocks:
        # The last block, and the one that four uniform bits hurt most.
        worst = max(blocks, key=lambda b: _coarse(b["codes"])["snr"])
        chosen = sorted({worst["block"], blocks[-1]["block"]})
    levels = [
        {"block": b["block"], "svg": Markup(attention_levels(BlockAttention(**b)))}
        for b in blocks
        if b["block"] in chosen
    ]
    rollout = found["rollout"]
    svg = ""
    if rollout is not None:
        maps = {"float": rollout["float_map"], "quantized": rollout["quantized_map"]}
        svg = rollout_maps(maps)
    return {**found, "levels": levels, "rollout_svg": Markup(svg), "share": MAP_SHARE}
